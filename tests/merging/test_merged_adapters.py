"""Adapters merged with adapters: exact sums, other methods on the products, and what does not go together."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from quantlab.adapters.adapter import Adapter, LowRankPair, Training
from quantlab.adapters.peft_config import peft_config
from quantlab.adapters.peft_folder import write_peft_folder
from quantlab.adapters.reading import read_adapter
from quantlab.errors import InputError
from quantlab.merging.adapters import merge_adapters, write_merged_adapter
from quantlab.merging.methods.method import merge_tensor, parameters_of
from quantlab.merging.methods.noise import Noise
from quantlab.merging.methods.table import METHODS

SHAPES = {"model.layers.0.self_attn.q_proj.weight": (24, 32), "model.layers.1.mlp.up_proj.weight": (40, 32)}


def made(folder: Path, ranks: tuple[int, ...], seed: int, names=tuple(SHAPES), **training: object) -> Adapter:
    generator = np.random.default_rng(seed)
    pairs = {
        name: LowRankPair(
            generator.normal(size=(rank, SHAPES[name][1])).astype(np.float32),
            generator.normal(size=(SHAPES[name][0], rank)).astype(np.float32),
            1.5,
        )
        for name, rank in zip(names, ranks, strict=True)
    }
    return Adapter(folder, "lora", pairs, Training(**training))


@pytest.fixture
def three(tmp_path: Path) -> list[Adapter]:
    second = list(SHAPES)[1]
    return [
        made(tmp_path / "0", (2, 4), 0, base="abc", vocabulary=9),
        made(tmp_path / "1", (3, 1), 1, base="abc", vocabulary=9),
        made(tmp_path / "2", (2,), 2, names=(second,), base="abc", vocabulary=9),
    ]


def product(adapter: Adapter, name: str) -> np.ndarray:
    pair = adapter.pairs.get(name)
    if pair is None:
        return np.zeros(SHAPES[name])
    return pair.scale * pair.b.astype(np.float64) @ pair.a.astype(np.float64)


@pytest.mark.parametrize(
    ("method", "parameters", "factors"),
    [
        ("linear", {}, (0.25, 0.5, 0.25)),
        ("linear", {"normalize": False}, (1.0, 2.0, 1.0)),
        ("task_arithmetic", {"lambda": 0.5}, (0.5, 1.0, 0.5)),
    ],
)
def test_sums_are_exact_in_any_order(method: str, parameters: dict, factors: tuple, three: list[Adapter]) -> None:
    weights = (1.0, 2.0, 1.0)
    for order in itertools.permutations(range(3)):
        merged = merge_adapters([three[i] for i in order], [weights[i] for i in order], method, parameters)
        assert (merged.method, merged.training.base, merged.training.vocabulary) == ("lora", "abc", 9)
        assert {name: pair.rank for name, pair in merged.pairs.items()} == dict(zip(SHAPES, (5, 7), strict=True))
        for name in SHAPES:
            wanted = sum(factor * product(adapter, name) for factor, adapter in zip(factors, three, strict=True))
            np.testing.assert_allclose(product(merged, name), wanted, rtol=1e-6, atol=1e-6)


def test_a_negative_weight_takes_an_adapter_away(three: list[Adapter]) -> None:
    merged = merge_adapters([three[0], three[0]], [1.0, -1.0], "task_arithmetic", {})
    for name in SHAPES:
        assert np.abs(product(merged, name)).max() < 1e-6


def test_a_rank_cuts_a_sum_to_its_best_part(three: list[Adapter]) -> None:
    kept: dict[str, float] = {}
    merged = merge_adapters(three, None, "task_arithmetic", {"weight": (1.0,) * 3}, 3, captured=kept.__setitem__)
    for name in SHAPES:
        u, s, vh = np.linalg.svd(sum(product(adapter, name) for adapter in three))
        assert merged.pairs[name].rank == 3
        np.testing.assert_allclose(product(merged, name), (u[:, :3] * s[:3]) @ vh[:3], rtol=0, atol=1e-4)
        assert kept[name] == pytest.approx((s[:3] ** 2).sum() / (s**2).sum(), abs=1e-6)


@pytest.mark.parametrize("method", ["ties", "dare_ties", "dare_linear", "iso_c", "tsv_m"])
def test_other_methods_go_by_the_products(method: str, three: list[Adapter]) -> None:
    parameters = {"density": (0.5, 0.7, 0.9)} if "density" in parameters_of(METHODS[method]) else {}
    merged = merge_adapters(three, [1.0, 0.5, 2.0], method, parameters, 24, seed=7)
    for name, shape in SHAPES.items():
        products = [torch.from_numpy(product(adapter, name).astype(np.float32)) for adapter in three]
        wanted = merge_tensor(
            METHODS[method],
            torch.zeros(shape),
            products,
            {**parameters, "weight": (1.0, 0.5, 2.0)},
            noise=Noise(7, name),
        )
        found = product(merged, name)
        u, s, vh = np.linalg.svd(wanted.double().numpy(), full_matrices=False)
        np.testing.assert_allclose(found, (u[:, :24] * s[:24]) @ vh[:24], rtol=0, atol=2e-4 * s[0])


def test_a_survey_of_the_whole_model_sees_all_updates(three: list[Adapter]) -> None:
    """TIES as in the paper: one threshold over all tensors, so that small updates vanish beside large ones."""
    first, second = SHAPES
    small = [dataclasses.replace(a, pairs={n: scaled(p, 1e-3 if n == first else 1.0) for n, p in a.pairs.items()})
             for a in three[:2]]  # fmt: skip
    parameters = {"density": (0.2, 0.2), "trim": "model"}
    merged = merge_adapters(small, [1.0, 1.0], "ties", parameters, 24)
    assert not product(merged, first).any()
    assert product(merged, second).any()
    assert product(merge_adapters(small, [1.0, 1.0], "ties", {"density": (0.2, 0.2)}, 24), first).any()


def scaled(pair: LowRankPair, factor: float) -> LowRankPair:
    return dataclasses.replace(pair, scale=pair.scale * factor)


def test_the_default_rank_is_the_largest(three: list[Adapter]) -> None:
    merged = merge_adapters(three, None, "iso_c", {})
    assert {pair.rank for pair in merged.pairs.values()} == {4}


def test_nothing_left_is_a_pair_of_zeros(three: list[Adapter]) -> None:
    merged = merge_adapters([three[0], three[0]], [1.0, -1.0], "task_arithmetic", {}, 2)
    assert all(not product(merged, name).any() for name in SHAPES)


def test_block_sums_stay_block_sums(tmp_path: Path) -> None:
    adapters = [dataclasses.replace(made(tmp_path, (2, 2), seed), method="block-sum") for seed in (0, 1)]
    assert merge_adapters(adapters, None, "linear", {"weight": (1.0, 1.0)}).method == "block-sum"
    assert merge_adapters(adapters, None, "iso_c", {}).method == "lora"


def test_it_is_written_and_read_again(llama_model: Path, tmp_path: Path) -> None:
    """The ranks of tensors differ; peft and our own reader find the same updates."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    names = ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.v_proj.weight")
    shapes = dict(zip(names, ((64, 64), (32, 64)), strict=True))
    adapters = []
    for number, held in enumerate((names, names[:1])):
        generator = np.random.default_rng(number)
        pairs = {
            name: LowRankPair(
                generator.normal(0, 0.1, (2, shapes[name][1])).astype(np.float32),
                generator.normal(0, 0.1, (shapes[name][0], 2)).astype(np.float32),
                2.0,
            )
            for name in held
        }
        adapter = Adapter(tmp_path / f"in{number}", "lora", pairs)
        write_peft_folder(adapter, peft_config(adapter, str(llama_model)), adapter.path)
        adapters.append(read_adapter(adapter.path))
    merged = merge_adapters(adapters, [1.0, 3.0], "linear", {"normalize": False})
    write_merged_adapter(merged, adapters[0], tmp_path / "out")
    again = read_adapter(tmp_path / "out")
    assert {name: (pair.rank, pair.scale) for name, pair in again.pairs.items()} == {
        names[0]: (4, 1.0),
        names[1]: (2, 1.0),
    }
    base = AutoModelForCausalLM.from_pretrained(llama_model)
    before = {name: base.get_parameter(name).detach().double().numpy().copy() for name in names}
    live = PeftModel.from_pretrained(base, str(tmp_path / "out")).merge_and_unload()
    for name in names:
        wanted = before[name] + sum(
            weight * pair.scale * pair.b.astype(np.float64) @ pair.a
            for adapter, weight in zip(adapters, (1.0, 3.0), strict=True)
            if (pair := adapter.pairs.get(name)) is not None
        )
        np.testing.assert_allclose(live.get_parameter(name).detach().numpy(), wanted, rtol=0, atol=1e-5)


def test_what_is_refused(three: list[Adapter], tmp_path: Path) -> None:
    name, pair = next(iter(three[0].pairs.items()))
    dora = Adapter(tmp_path, "lora", {name: dataclasses.replace(pair, magnitude=np.ones(24, np.float32))})
    narrow = Adapter(tmp_path / "n", "lora", {name: LowRankPair(pair.a[:, :16], pair.b, 1.0)})
    other = dataclasses.replace(three[1], training=Training(base="xyz"))
    for message, adapters, method, parameters in (
        ("is a DoRA", [three[0], dora], "linear", {}),
        (r"\[24, 16\] in .*\[24, 32\] in", [three[0], narrow], "linear", {}),
        ("different bases", [three[0], other], "linear", {}),
        ("choose one of: ", three, "average", {}),
        ("needs the inputs", three, "regmean", {}),
        ("none of that name", three, "iso_c", {"lamda": 1.0}),
    ):
        with pytest.raises(InputError, match=message):
            merge_adapters(adapters, [1.0] * len(adapters), method, parameters)
    with pytest.raises(InputError, match="--rank 0"):
        merge_adapters(three, None, "iso_c", {}, 0)
