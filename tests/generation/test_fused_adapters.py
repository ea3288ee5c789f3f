"""Adapters that were trained for fused blocks run as `fuse` writes them, to the last bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from random_adapters import random_adapter

from quantlab import InputError, fuse_adapter, load_engine, quantize_checkpoint
from quantlab.adapters.adapter import Adapter, LowRankPair, Training
from quantlab.generation.engines import open_engine

IDS = [1, *range(30, 60)]
FAMILIES = ["llama", "gpt2", "gpt_neox", "phi3"]


def trained(model: Path, method: str, seed: int = 0, **training: object) -> Adapter:
    adapter = random_adapter(model, seed=seed)
    if method == "block-sum":
        adapter = replace(adapter, pairs={name: constant(pair) for name, pair in adapter.pairs.items()})
    return replace(adapter, method=method, training=Training(device="cpu", **training))


def constant(pair: LowRankPair) -> LowRankPair:
    return replace(pair, a=np.ascontiguousarray(np.repeat(pair.a[:, ::32], 32, axis=1)))


@pytest.fixture(scope="module")
def bases(make_model, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, found = tmp_path_factory.mktemp("bases"), {}
    for family in FAMILIES:
        make_model(folder / family, family)
        for format, suffix in (("q4_1", ""), ("q8_0", ".gguf")):
            found[f"{family} {format}"] = folder / f"{family}-{format}{suffix}"
            quantize_checkpoint(folder / family, found[f"{family} {format}"], format=format)
    return found


def logits(model: Path, **options: object) -> np.ndarray:
    return load_engine(model, threads=1, **options).logits_of(IDS)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("format", "method", "training"),
    [
        ("q4_1", "block-sum", {}),
        ("q4_1", "merge-aware", {}),
        ("q8_0", "merge-aware", {}),
        ("q4_1", "merge-aware", {"regrid": True, "levels": 8}),
    ],
    ids=str,
)
def test_an_adapter_is_the_fused_file_to_the_bit(family, format, method, training, bases, tmp_path: Path) -> None:
    base = bases[f"{family} {format}"]
    adapter = replace(trained(base, method, **training), path=tmp_path)
    fuse_adapter(base, adapter, tmp_path / "fused")
    expected = logits(tmp_path / "fused")
    assert np.array_equal(logits(base, adapters=[adapter]), expected)
    assert not np.array_equal(logits(base), expected)


def test_weights_and_several_are_fused_as_fuse_does(bases, tmp_path: Path) -> None:
    base = bases["llama q4_1"]
    chosen = [(trained(base, "merge-aware", seed), weight) for seed, weight in ((1, 0.5), (2, -1.0))]
    fuse_adapter(base, chosen, tmp_path / "fused")
    assert np.array_equal(logits(base, adapters=chosen), logits(tmp_path / "fused"))


def test_exchanging_leaves_no_trace(bases) -> None:
    base = bases["gpt_neox q4_1"]
    one, two = trained(base, "merge-aware", 1), trained(base, "block-sum", 2)
    query = {name: pair for name, pair in one.pairs.items() if "query" in name}
    plain, part = random_adapter(base, seed=3), replace(one, pairs=query)
    engine = load_engine(base, threads=1)
    for adapters in ([one], [], [part], [two], [plain], [one, plain], [part], []):
        engine.set_adapters(adapters)
        assert engine.tokens == []
        assert np.array_equal(engine.logits_of(IDS), logits(base, adapters=adapters))


def test_the_torch_engine_has_the_same_weights(bases) -> None:
    base = bases["phi3 q4_1"]
    adapters = [trained(base, "merge-aware")]
    native = load_engine(base, threads=1, kv="f32", activations="f32", adapters=adapters)
    torch = open_engine(base, "torch", threads=1, adapters=adapters)
    native.prefill(IDS)
    torch.prefill(IDS)
    np.testing.assert_allclose(native.logits(), torch.logits(), rtol=1e-3, atol=1e-3)


def test_a_saved_cache_tells_fused_weights_from_those_beside(bases, tmp_path: Path) -> None:
    base = bases["llama q4_1"]
    fused = trained(base, "merge-aware")
    engine = load_engine(base, threads=1, adapters=[fused])
    engine.prefill(IDS)
    engine.save(tmp_path / "cache")
    beside = load_engine(base, threads=1, adapters=[replace(fused, method="lora")])
    assert not beside.restore(tmp_path / "cache")
    assert load_engine(base, threads=1, adapters=[fused]).restore(tmp_path / "cache")


def test_what_blocks_cannot_hold_changes_nothing(bases) -> None:
    engine = load_engine(bases["llama q8_0"], threads=1)
    expected = engine.logits_of(IDS)
    with pytest.raises(InputError, match="q4_1 or q5_1"):
        engine.set_adapters([trained(bases["llama q8_0"], "block-sum")])
    assert np.array_equal(engine.logits_of(IDS), expected)
