"""The native engine against transformers on the same weights, and against itself: the same bits however called."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantlab import InputError, load_model, quantize_checkpoint
from quantlab.checkpoint.export import export_checkpoint
from quantlab.checkpoint.families import FAMILIES
from quantlab.generation.native_engine import NativeEngine, load_native
from quantlab.generation.sampling import SamplingParams

LENGTHS = (1, 7, 64, 500)
EXACT = 1e-4  # of the largest logit: fp32 sums in another order
ROUNDED = 0.03  # of the largest logit: activations in int8, an fp16 cache


CONTRACT = settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def tokens(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, 512, count).tolist()


def torch_logits(folder: Path, ids: list[int]) -> np.ndarray:
    with torch.inference_mode():
        return load_model(folder)(input_ids=torch.tensor([ids]), use_cache=False).logits[0].numpy()


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, make_model, tmp_path_factory) -> Path:
    """A tiny random model of each family that holds 512 tokens."""
    folder = tmp_path_factory.mktemp(request.param)
    longer = {"n_positions": 512} if request.param == "gpt2" else {"max_position_embeddings": 512}
    return make_model(folder, request.param, tied=FAMILIES[request.param].tied_by_default, **longer)


@pytest.mark.parametrize("packed", [False, True])
def test_float_activations_give_transformers_logits(model, packed, tmp_path):
    if packed:
        quantize_checkpoint(model, tmp_path / "packed")
        model = tmp_path / "packed"
    engine = load_native(model, activations="f32", kv="f32", threads=1)
    for length in LENGTHS:
        ids = tokens(length)
        expected = torch_logits(model, ids)
        difference = np.abs(engine.logits_of(ids) - expected).max()
        assert difference <= EXACT * np.abs(expected).max(), length


def test_int8_activations_stay_close(model, tmp_path):
    quantize_checkpoint(model, tmp_path / "packed")
    engine = load_native(tmp_path / "packed", threads=1)
    ids = tokens(100)
    expected = torch_logits(tmp_path / "packed", ids)
    got = engine.logits_of(ids)
    assert np.abs(got - expected).mean() <= ROUNDED * np.abs(expected).max()
    assert not np.array_equal(got, load_native(tmp_path / "packed", activations="f32").logits_of(ids))


def test_folder_and_gguf_are_the_same_model(model, tmp_path):
    quantize_checkpoint(model, tmp_path / "packed")
    export_checkpoint(tmp_path / "packed", tmp_path / "packed.gguf", "gguf")
    ids = tokens(40)
    one, other = load_native(tmp_path / "packed"), load_native(tmp_path / "packed.gguf")
    assert np.array_equal(one.logits_of(ids), other.logits_of(ids))


@pytest.fixture(scope="module", params=["llama", "gemma3_text", "gpt_neox"])
def packed(request, make_model, tmp_path_factory) -> Path:
    """Packed models with grouped queries, windows and head norms, and a parallel residual."""
    folder = tmp_path_factory.mktemp("bits")
    # Heads of 32, as a q8_0 cache wants them.
    heads = {"num_attention_heads": 2} if request.param == "gpt_neox" else {"head_dim": 32}
    if request.param == "gemma3_text":
        heads["query_pre_attn_scalar"] = 32
    make_model(folder / "float", request.param, tied=FAMILIES[request.param].tied_by_default, **heads)
    quantize_checkpoint(folder / "float", folder / "packed")
    return folder / "packed"


@given(data=st.data())
@settings(CONTRACT)
def test_the_same_bits_however_it_is_called(packed, monkeypatch, data):
    """Threads, kernels, chunks, one by one or at once, cold or rewound: the contract."""
    ids = tokens(data.draw(st.integers(2, 100)), data.draw(st.integers(0, 3)))
    kv = data.draw(st.sampled_from(["f16", "f32", "q8_0"]))
    activations = data.draw(st.sampled_from(["int8", "f32"]))
    expected = load_native(packed, threads=1, kv=kv, activations=activations).logits_of(ids)
    with monkeypatch.context() as context:
        context.setenv("QUANTLAB_CPU_KERNEL", data.draw(st.sampled_from(kernels())))
        engine = load_native(packed, threads=data.draw(st.integers(1, 4)), kv=kv, activations=activations)
    start = data.draw(st.integers(0, 50))
    engine.prefill(tokens(1 + start, 9))  # something else first, to be rewound
    engine.prefill(ids[: len(ids) // 2 + 1])
    engine.rewind(data.draw(st.integers(0, len(ids) // 2)))
    cached = engine.prefill(ids, chunk=data.draw(st.integers(1, 100)))
    assert cached < len(ids)
    assert np.array_equal(engine.logits(), expected[-1])
    engine.rewind(len(ids) - 1)
    engine.prefill(ids)
    assert np.array_equal(engine.logits(), expected[-1])


def kernels() -> list[str]:
    from quantlab import native

    return ["scalar"] if native.cpu_kernel() == "scalar" else ["scalar", native.cpu_kernel()]


def test_decoding_is_prefilling(packed):
    engine = load_native(packed, threads=2)
    engine.prefill(tokens(5))
    drawn = list(engine.decode(SamplingParams(temperature=0), 20))
    whole = load_native(packed, threads=1).logits_of(tokens(5) + drawn)
    assert whole[4:-1].argmax(axis=1).tolist() == drawn


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kv": "q4"}, "kv 'q4': choose one of"),
        ({"activations": "int4"}, "activations 'int4': choose one of"),
        ({"threads": 0}, "threads 0: at least 1 is needed"),
        ({"context": -1}, "at least 1 token is needed"),
    ],
)
def test_arguments_that_make_no_sense(packed, arguments, message):
    with pytest.raises(InputError, match=message):
        load_native(packed, **arguments)


def test_tokens_that_do_not_fit(packed):
    engine = load_native(packed, context=8)
    with pytest.raises(InputError, match="the context holds 8"):
        engine.prefill(tokens(9))
    with pytest.raises(InputError, match="token id 512 is outside the vocabulary of 512"):
        engine.prefill([512])
    engine.prefill(tokens(8))
    assert isinstance(engine, NativeEngine)
    assert engine.position == 8


@pytest.mark.parametrize("kv", ["f16", "f32", "q8_0"])
def test_a_restored_cache_gives_the_bits_of_a_cold_run(packed, kv, tmp_path):
    ids = tokens(60)
    saved = load_native(packed, threads=1, kv=kv)
    saved.prefill(ids[:41])
    saved.save(tmp_path / "cache")
    engine = load_native(packed, threads=2, kv=kv, context=100)
    assert engine.restore(tmp_path / "cache")
    assert engine.prefill(ids) == 41
    cold = load_native(packed, threads=1, kv=kv)
    cold.prefill(ids)
    assert np.array_equal(engine.logits(), cold.logits())
    other = ids[:30] + tokens(20, 5)
    assert 30 <= engine.prefill(other) < 41
    cold.prefill(other)
    assert np.array_equal(engine.logits(), cold.logits())


def test_what_is_not_ours_is_a_clean_miss(packed, make_model, tmp_path):
    """Other weights, other types, a short context, damage anywhere: the engine stays as it was."""
    ids = tokens(30)
    engine = load_native(packed, threads=1)
    engine.prefill(ids)
    before = engine.logits().copy()
    engine.save(tmp_path / "cache")
    whole = (tmp_path / "cache").read_bytes()
    make_model(tmp_path / "other", "llama", seed=7)
    for stranger in (
        load_native(tmp_path / "other", threads=1),
        load_native(packed, threads=1, kv="f32"),
        load_native(packed, threads=1, activations="f32"),
        load_native(packed, threads=1, context=29),
    ):
        assert not stranger.restore(tmp_path / "cache")
        assert stranger.position == 0
    for damaged in (
        b"",
        whole[:20],
        whole[:-1],
        whole + b"x",
        b"x" + whole[1:],
        flipped(whole, 40),
        flipped(whole, -9),
    ):
        (tmp_path / "damaged").write_bytes(damaged)
        assert not engine.restore(tmp_path / "damaged")
        assert engine.tokens == ids
        assert np.array_equal(engine.logits(), before)
    assert not engine.restore(tmp_path / "nothing")


def flipped(data: bytes, position: int) -> bytes:
    changed = bytearray(data)
    changed[position] ^= 1
    return bytes(changed)
