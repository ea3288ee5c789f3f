"""Adapters at run time: against weights that they were added to, and the engine's contract with them."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_adapters import merged_logits, random_adapter

from quantlab import InputError, load_engine, load_model, native, quantize_checkpoint
from quantlab.adapters.adapter import Adapter, LowRankPair
from quantlab.adapters.peft_folder import write_peft_folder
from quantlab.checkpoint.families import FAMILIES
from quantlab.generation.engines import open_engine
from quantlab.generation.native_engine import NativeEngine

EXACT = 1e-4  # of the largest logit: fp32 sums in another order
# Between them all: separate and joint projections, interleaved heads, both norms, with gate and without. A q8_0 cache
# wants heads of 32.
MODELS = {
    "llama": {"num_attention_heads": 2, "num_key_value_heads": 1},
    "gpt2": {"n_head": 2},
    "gpt_neox": {"num_attention_heads": 2},
    "phi3": {"num_attention_heads": 2, "num_key_value_heads": 1},
    "gemma3_text": {"head_dim": 32, "query_pre_attn_scalar": 32, "num_hidden_layers": 2},
}
WIDE = 400  # so large a rank that threads divide its products of few tokens
QUERY = "model.layers.0.self_attn.q_proj.weight"


def tokens(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, 512, count).tolist()


def exact_engine(model: Path, **arguments) -> NativeEngine:
    return load_engine(model, activations="f32", kv="f32", **arguments)


def assert_near(found: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(found - expected).max() <= EXACT * np.abs(expected).max()


@pytest.fixture(scope="module", params=MODELS)
def model(request, make_model, tmp_path_factory) -> Path:
    """A tiny random float model."""
    family = request.param
    folder = tmp_path_factory.mktemp(family) / "float"
    return make_model(folder, family, tied=FAMILIES[family].tied_by_default, **MODELS[family])


@pytest.fixture(scope="module")
def packed(model) -> Path:
    quantize_checkpoint(model, model.parent / "packed")
    return model.parent / "packed"


@pytest.fixture(scope="module")
def llama(make_model, tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("one") / "float", "llama")


# What is computed.


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("is_packed", [False, True])
def test_logits_are_those_of_the_merged_weights(model, packed, threads, is_packed):
    folder = packed if is_packed else model
    adapter, ids = random_adapter(folder), tokens(70)
    expected = merged_logits(folder, [(adapter, 1.0)], ids)
    assert_near(exact_engine(folder, threads=threads, adapters=[adapter]).logits_of(ids), expected)
    base = exact_engine(folder, threads=threads).logits_of(ids)
    assert np.abs(base - expected).max() > 0.1 * np.abs(expected).max()  # the adapter does change the model


@pytest.mark.parametrize("part", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
def test_one_matrix_alone(llama, part):
    adapter, ids = random_adapter(llama, takes=lambda name: part in name, size=1.0), tokens(20)
    assert_near(exact_engine(llama, adapters=[adapter]).logits_of(ids), merged_logits(llama, [(adapter, 1.0)], ids))


def test_int8_activations_stay_close(packed):
    """The update is computed from activations that are not rounded: it adds no error of its own kind."""
    adapter, ids = random_adapter(packed), tokens(60)
    expected = merged_logits(packed, [(adapter, 1.0)], ids)
    found = load_engine(packed, adapters=[adapter]).logits_of(ids)
    assert np.abs(found - expected).mean() <= 0.03 * np.abs(expected).max()


def test_several_adapters_with_weights_add_up(packed):
    one, other, ids = random_adapter(packed), random_adapter(packed, 5, seed=1), tokens(40)
    chosen = [(one, 0.5), (other, -1.25)]
    assert_near(exact_engine(packed, adapters=chosen).logits_of(ids), merged_logits(packed, chosen, ids))


def test_the_torch_engine_computes_the_same(packed):
    adapter, ids = random_adapter(packed), tokens(30)
    engine = open_engine(packed, "torch", adapters=[(adapter, 0.75)])
    engine.prefill(ids)
    assert_near(engine.logits(), merged_logits(packed, [(adapter, 0.75)], ids)[-1])


@pytest.mark.parametrize(("family", "targets"), [("llama", ["q_proj", "down_proj"]), ("gpt2", ["c_attn", "c_fc"])])
def test_what_peft_trained_and_wrote(make_model, family, targets, tmp_path):
    """Its own files, its own forward pass."""
    from peft import LoraConfig, get_peft_model

    make_model(tmp_path / "model", family)
    config = LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=targets, fan_in_fan_out=family == "gpt2")
    torch.manual_seed(0)
    adapted = get_peft_model(load_model(tmp_path / "model"), config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    ids = tokens(30)
    with torch.inference_mode():
        expected = adapted.eval()(input_ids=torch.tensor([ids]), use_cache=False).logits[0].numpy()
    assert_near(exact_engine(tmp_path / "model", adapters=[tmp_path / "adapter"]).logits_of(ids), expected)


# The contract.


def kernels() -> list[str]:
    return ["scalar"] if native.cpu_kernel() == "scalar" else ["scalar", native.cpu_kernel()]


@given(data=st.data())
@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_same_bits_however_it_is_called(packed, monkeypatch, data):
    """Threads, kernels, chunks, one by one or at once, cold, rewound or restored."""
    ids = tokens(data.draw(st.integers(2, 100)), data.draw(st.integers(0, 3)))
    adapter = random_adapter(packed, data.draw(st.sampled_from([1, 6, WIDE])))
    kinds = {
        "kv": data.draw(st.sampled_from(["f16", "f32", "q8_0"])),
        "activations": data.draw(st.sampled_from(["int8", "f32"])),
        "adapters": [adapter],
    }
    expected = load_engine(packed, threads=1, **kinds).logits_of(ids)
    with monkeypatch.context() as context:
        context.setenv("QUANTLAB_CPU_KERNEL", data.draw(st.sampled_from(kernels())))
        engine = load_engine(packed, threads=data.draw(st.integers(1, 4)), **kinds)
    engine.prefill(tokens(1 + data.draw(st.integers(0, 50)), 9))  # something else first, to be rewound
    engine.prefill(ids, chunk=data.draw(st.integers(1, 100)))
    assert np.array_equal(engine.logits(), expected[-1])
    kept = data.draw(st.integers(1, len(ids) - 1))
    engine.rewind(kept)
    saved = packed.parent / "saved"
    engine.save(saved)
    other = load_engine(packed, threads=data.draw(st.integers(1, 3)), **kinds)
    assert other.restore(saved)
    for token in ids[kept:]:
        other.append([token])
    assert np.array_equal(other.logits(), expected[-1])


def test_b_of_zeros_gives_the_bits_of_the_model_itself(packed):
    adapter, ids = random_adapter(packed), tokens(70)
    zero = replace(adapter, pairs={n: replace(p, b=np.zeros_like(p.b)) for n, p in adapter.pairs.items()})
    expected = load_engine(packed).logits_of(ids)
    assert np.array_equal(load_engine(packed, adapters=[zero]).logits_of(ids), expected)
    assert np.array_equal(load_engine(packed, adapters=[(adapter, 0)]).logits_of(ids), expected)


# Exchanged at run time.


def test_exchanging_is_loading_anew(packed):
    one, other, ids = random_adapter(packed), random_adapter(packed, WIDE, seed=1), tokens(50)
    engine = load_engine(packed, threads=2, adapters=[one])
    engine.prefill(ids)
    engine.set_adapters([(other, 2.0), one])
    assert (engine.position, engine.tokens) == (0, [])
    assert engine.prefill(ids) == 0
    fresh = load_engine(packed, threads=1, adapters=[(other, 2.0), one])
    assert np.array_equal(engine.logits(), fresh.logits_of(ids)[-1])
    assert engine.weight_bytes == fresh.weight_bytes > load_engine(packed).weight_bytes
    engine.set_adapters([])
    assert np.array_equal(engine.logits_of(ids), load_engine(packed).logits_of(ids))


def test_a_cache_belongs_to_its_adapters(llama, tmp_path):
    one, other, ids = random_adapter(llama), random_adapter(llama, seed=1), tokens(20)
    engine = load_engine(llama, adapters=[one])
    engine.prefill(ids)
    engine.save(tmp_path / "cache")
    for strange in ([], [other], [(one, 0.5)], [one, other]):
        engine.set_adapters(strange)
        assert not engine.restore(tmp_path / "cache")
        assert engine.position == 0
    engine.set_adapters([one])
    assert engine.restore(tmp_path / "cache")
    assert engine.tokens == ids
    engine.set_adapters([])
    engine.prefill(ids)
    engine.save(tmp_path / "plain")
    engine.set_adapters([one])
    assert not engine.restore(tmp_path / "plain")


# What cannot be applied.


def pair(rows: int, columns: int, rank: int = 2) -> LowRankPair:
    return LowRankPair(np.ones((rank, columns), np.float32), np.ones((rows, rank), np.float32), 1.0)


@pytest.mark.parametrize("kind", ["native", "torch"])
@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (Adapter(Path("here"), "lora", {QUERY: pair(64, 32)}), "here: does not fit .*q_proj.weight is .64, 64. in the"),
        (Adapter(Path("here"), "lora", {QUERY.replace("0", "7"): pair(64, 64)}), "layers.7.*is not in the model"),
        (Adapter(Path("here"), "lora", {"lm_head.weight": pair(512, 64)}), "lm_head.weight; .*fuse it into the model"),
        (Adapter(Path("here"), "lora", {"model.embed_tokens.weight": pair(512, 64)}), "adapts model.embed_tokens"),
        (
            Adapter(Path("here"), "lora", {QUERY: replace(pair(64, 64), magnitude=np.ones(64, np.float32))}),
            "DoRA .*fuse it into the model",
        ),
        ("no/such/folder", "no/such/folder: no such adapter"),
        ((Adapter(Path("here"), "lora", {QUERY: pair(64, 64)}), float("nan")), "adapter weight nan: a finite number"),
        ((Adapter(Path("here"), "lora", {QUERY: pair(64, 64)}), "1"), "adapter weight '1': a finite number"),
    ],
)
def test_adapters_that_engines_do_not_compute(llama, kind, adapter, message):
    with pytest.raises(InputError, match=message):
        open_engine(llama, kind, adapters=[adapter])


def test_a_list_is_expected(llama):
    with pytest.raises(InputError, match="a list is expected"):
        load_engine(llama, adapters="folder")


def test_an_error_changes_nothing(llama):
    adapter, ids = random_adapter(llama), tokens(20)
    engine = load_engine(llama, adapters=[adapter])
    expected = engine.logits_of(ids)
    with pytest.raises(InputError, match="does not fit"):
        engine.set_adapters([Adapter(Path("here"), "lora", {QUERY: pair(64, 32)})])
    assert engine.tokens == ids
    assert np.array_equal(engine.logits(), expected[-1])
    assert np.array_equal(engine.logits_of(ids), expected)


def test_merge_aware_adapters_are_told_of(llama, caplog):
    with caplog.at_level(logging.WARNING):
        load_engine(llama, adapters=[replace(random_adapter(llama), method="merge-aware")])
    assert "was trained for fused weights" in caplog.text


def test_adapters_come_from_folders(llama, tmp_path):
    adapter = random_adapter(llama, takes=lambda name: "q_proj" in name)
    same = {name: replace(found, scale=1.0, a=found.a[:3], b=found.b[:, :3]) for name, found in adapter.pairs.items()}
    adapter = replace(adapter, pairs=same)
    write_peft_folder(adapter, {"peft_type": "LORA", "r": 3, "lora_alpha": 3}, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 3
    ids = tokens(10)
    expected = load_engine(llama, adapters=[adapter]).logits_of(ids)
    assert np.array_equal(load_engine(llama, adapters=[str(tmp_path / "adapter")]).logits_of(ids), expected)
