"""The native engine over ternary weights: transformers' logits, and the same bits however it is called."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_adapters import merged_logits, random_adapter

from quantlab import load_model, native, quantize_checkpoint
from quantlab.checkpoint import open_checkpoint
from quantlab.checkpoint.export import export_checkpoint
from quantlab.generation.decoder_description import describe
from quantlab.generation.memory import needed_memory
from quantlab.generation.native_engine import load_native

EXACT = 1e-4  # of the largest logit: fp32 sums in another order
ROUNDED = 0.03  # of the largest logit: activations in int8, an fp16 cache
# Every input of a matrix has a multiple of 256 columns.
MODELS = {
    "llama": {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2},
    "gpt2": {"n_embd": 256, "n_head": 4},
    "gpt_neox": {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4},
}
CONTRACT = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def tokens(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, 512, count).tolist()


def torch_logits(folder: Path, ids: list[int]) -> np.ndarray:
    with torch.inference_mode():
        return load_model(folder)(input_ids=torch.tensor([ids]), use_cache=False).logits[0].numpy()


@pytest.fixture(scope="module", params=MODELS)
def ternary(request, make_model, tmp_path_factory) -> Path:
    """A random model, rounded to three levels, embedding and head in Q8_0."""
    folder = tmp_path_factory.mktemp(request.param)
    make_model(folder / "float", request.param, **MODELS[request.param])
    quantize_checkpoint(folder / "float", folder / "ternary", format="tq2_0")
    return folder / "ternary"


@pytest.fixture(scope="module")
def float_llama(make_model, tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("one") / "float", "llama", tied=False, **MODELS["llama"])


@pytest.fixture(scope="module")
def mixed(float_llama) -> Path:
    """Matrices that share an input and want it rounded in different ways, in all four places."""
    rules = [
        ["*.v_proj.weight", "q4_1"],
        ["*.up_proj.weight", "q8_0"],
        ["*.1.*.down_proj.weight", "q5_0"],
        ["*.0.*.o_proj.weight", None],
    ]
    recipe, out = float_llama.parent / "recipe.yaml", float_llama.parent / "mixed"
    recipe.write_text(yaml.safe_dump({"rules": [*rules, ["lm_head.weight", "tq2_0"]], "base": "tq2_0"}))
    quantize_checkpoint(float_llama, out, recipe=str(recipe))
    return out


def test_float_activations_give_transformers_logits(ternary):
    engine = load_native(ternary, activations="f32", kv="f32", threads=1)
    for length in (1, 7, 100):
        ids = tokens(length)
        expected = torch_logits(ternary, ids)
        assert np.abs(engine.logits_of(ids) - expected).max() <= EXACT * np.abs(expected).max(), length


def test_int8_activations_stay_close(ternary):
    ids = tokens(100)
    expected, found = torch_logits(ternary, ids), load_native(ternary, threads=1).logits_of(ids)
    assert np.abs(found - expected).mean() <= ROUNDED * np.abs(expected).max()
    assert not np.array_equal(found, load_native(ternary, activations="f32").logits_of(ids))


def test_folder_and_gguf_are_the_same_model(ternary, tmp_path):
    export_checkpoint(ternary, tmp_path / "ternary.gguf", "gguf")
    ids = tokens(40)
    one, other = load_native(ternary, threads=1), load_native(tmp_path / "ternary.gguf", threads=1)
    assert np.array_equal(one.logits_of(ids), other.logits_of(ids))


def test_matrices_of_a_mixed_recipe_stay_close_too(mixed):
    found = {open_checkpoint(mixed).stored_type(name) for name in open_checkpoint(mixed).names}
    assert found == {"tq2_0", "q4_1", "q5_0", "q8_0", "f32"}
    ids = tokens(100)
    expected = torch_logits(mixed, ids)
    exact = load_native(mixed, activations="f32", kv="f32", threads=1).logits_of(ids)
    assert np.abs(exact - expected).max() <= EXACT * np.abs(expected).max()
    assert np.abs(load_native(mixed, threads=1).logits_of(ids) - expected).mean() <= ROUNDED * np.abs(expected).max()


@given(data=st.data())
@CONTRACT
def test_the_same_bits_however_it_is_called(ternary, monkeypatch, data):
    """Threads, kernels, chunks, one by one or at once, cold or rewound: the contract."""
    check_contract(ternary, monkeypatch, data)


@given(data=st.data())
@CONTRACT
def test_the_same_bits_of_a_mixed_recipe(mixed, monkeypatch, data):
    check_contract(mixed, monkeypatch, data)


def check_contract(folder: Path, monkeypatch: pytest.MonkeyPatch, data: st.DataObject) -> None:
    ids = tokens(data.draw(st.integers(2, 100)), data.draw(st.integers(0, 3)))
    kv = data.draw(st.sampled_from(["f16", "q8_0"]))
    expected = load_native(folder, threads=1, kv=kv).logits_of(ids)
    with monkeypatch.context() as context:
        context.setenv("QUANTLAB_CPU_KERNEL", data.draw(st.sampled_from(["scalar", native.cpu_kernel()])))
        engine = load_native(folder, threads=data.draw(st.integers(1, 4)), kv=kv)
    assert np.array_equal(engine.logits_of(ids), expected)
    engine.rewind(data.draw(st.integers(0, len(ids) - 1)))
    engine.prefill(ids, chunk=data.draw(st.integers(1, 100)))
    assert np.array_equal(engine.logits(), expected[-1])


@pytest.mark.parametrize("threads", [1, 3])
def test_adapters_are_computed_beside_the_weights(ternary, threads):
    """Not of block-sum or merge-aware training, whose blocks are to take them up: one scale a tensor cannot."""
    adapter, ids = random_adapter(ternary), tokens(70)
    expected = merged_logits(ternary, [(adapter, 1.0)], ids)
    engine = load_native(ternary, activations="f32", kv="f32", threads=threads, adapters=[adapter])
    assert np.abs(engine.logits_of(ids) - expected).max() <= EXACT * np.abs(expected).max()
    rounded = load_native(ternary, threads=threads, adapters=[adapter]).logits_of(ids)
    assert np.abs(rounded - expected).mean() <= ROUNDED * np.abs(expected).max()
    assert np.array_equal(rounded, load_native(ternary, threads=4 - threads, adapters=[adapter]).logits_of(ids))


def test_the_memory_estimate_is_what_the_core_takes(mixed):
    checkpoint = open_checkpoint(mixed)
    need = needed_memory(checkpoint, describe(checkpoint.config, "config"), 128, "f16")
    norms, embedding = 5 * 256 * 4, 512 * 256 // 32 * 34
    assert need.weights == load_native(mixed, threads=1).weight_bytes + norms + embedding
