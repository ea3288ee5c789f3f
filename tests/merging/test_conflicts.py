"""The conflict report: numbers worked by hand, any cutting into parts, the table and the picture."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from quantlab.errors import InputError
from quantlab.merging.conflict_plots import conflict_figure
from quantlab.merging.conflicts import CHUNK, ConflictMeter, ConflictMeters, ConflictReport, TensorConflict

TITLES = [
    "Cosine of the differences, mean over pairs",
    "Weights pulled both ways (%)",
    "Largest difference over smallest",
    "Error of packing (%)",
]
NAME = "model.layers.3.mlp.up_proj.weight"


def measured(base, tensors, cuts=(), name: str = NAME) -> TensorConflict:
    base, tensors = torch.as_tensor(base), [torch.as_tensor(tensor) for tensor in tensors]
    meter = ConflictMeter(len(tensors))
    ends = [0, *cuts, len(base)]
    for first, last in itertools.pairwise(ends):
        meter.add(base[first:last], [tensor[first:last] for tensor in tensors])
    return meter.result(name, [f"m{number}" for number in range(len(tensors))])


def test_worked_by_hand() -> None:
    base = torch.tensor([[1.0, -2.0, 2.0, 0.0]])  # norm 3
    found = measured(base, [base + torch.tensor([[3.0, 0, 4, 0]]), base + torch.tensor([[1.0, 5, -1, 0]])])
    assert (found.layer, found.kind, found.elements, found.models) == (3, "mlp.up_proj", 4, ("m0", "m1"))
    expected = (3 - 4) / (5 * 27**0.5)
    assert found.cosine == ((1.0, pytest.approx(expected)), (pytest.approx(expected), 1.0))
    assert found.opposite == ((0.0, 0.5), (0.5, 0.0))  # of the two elements that both change, one
    assert found.conflict == pytest.approx(1 / 3)  # of the three that any changes, one
    assert found.norms == (pytest.approx(5 / 3), pytest.approx(27**0.5 / 3))
    assert found.norm_ratio == pytest.approx(27**0.5 / 5)
    assert found.mean_cosine == found.lowest_cosine == pytest.approx(expected)


def test_models_that_change_nothing() -> None:
    base = torch.ones(5)
    found = measured(base, [base, base + 1, base])
    assert found.cosine[1] == (None, 1.0, None)
    assert found.opposite[0][1] is None
    assert (found.conflict, found.norm_ratio, found.mean_cosine) == (0.0, 1.0, None)
    still = measured(torch.zeros(1), [torch.zeros(1), torch.zeros(1)])
    assert (still.conflict, still.norms, still.norm_ratio, still.lowest_cosine) == (None, (None, None), None, None)
    alone = measured(base, [base * 2])
    assert (alone.cosine, alone.mean_cosine, alone.norms) == (((1.0,),), None, (1.0,))


@pytest.mark.parametrize("shape", [(37, 1000), (5 * CHUNK + 11,), (3, 7)])
def test_any_cut_gives_the_same_bits_and_numpys_values(shape: tuple[int, ...]) -> None:
    generator = np.random.default_rng(0)
    base = generator.normal(size=shape).astype(np.float32)
    tensors = [(base + 0.01 * generator.normal(size=shape)).astype(np.float32) for _ in range(3)]
    whole = measured(base, tensors)
    for _ in range(6):
        cuts = sorted(generator.integers(0, shape[0] + 1, size=generator.integers(1, 6)).tolist())
        assert measured(base, tensors, cuts) == whole
    assert measured(base, tensors, range(1, shape[0], max(1, shape[0] // 500))) == whole
    deltas = [tensor.astype(np.float64) - base for tensor in tensors]
    for i in range(3):
        for j in range(i):
            product = (deltas[i] * deltas[j]).sum() / np.linalg.norm(deltas[i]) / np.linalg.norm(deltas[j])
            assert whole.cosine[i][j] == whole.cosine[j][i] == pytest.approx(product, rel=1e-9, abs=1e-12)
            assert whole.opposite[i][j] == pytest.approx((deltas[i] * deltas[j] < 0).mean(), abs=1e-3)
    assert whole.norms == pytest.approx([np.linalg.norm(d) / np.linalg.norm(base.astype(float)) for d in deltas])
    up, down = sum(d > 0 for d in deltas) > 0, sum(d < 0 for d in deltas) > 0
    assert whole.conflict == pytest.approx((up & down).mean(), abs=1e-3)


def test_a_merge_shows_its_tensors_in_turns() -> None:
    meters = ConflictMeters()
    plans = {
        name: SimpleNamespace(name=name, shape=(4, 2), parts=[SimpleNamespace(model="x"), SimpleNamespace(model="y")])
        for name in ("a.weight", NAME, "no.base", "cut.short")
    }
    base = torch.ones(4, 2)
    for rows in (slice(0, 3), slice(3, 4)):
        for name in ("a.weight", NAME):
            meters.observe(plans[name], base[rows], [2 * base[rows], -base[rows]])
    meters.observe(plans["no.base"], None, [base, base])
    meters.observe(plans["cut.short"], base[:2], [base[:2], base[:2]])
    report = meters.report([NAME, "cut.short", "no.base", "a.weight"], {NAME: 0.25})
    assert [(t.name, t.models, t.requantization_error) for t in report.tensors] == [
        (NAME, ("x", "y"), 0.25),
        ("a.weight", ("x", "y"), None),
    ]
    assert report.tensors[0].cosine[0][1] == pytest.approx(-1.0)
    assert list(report.kinds()) == ["mlp.up_proj", "a"]
    told = json.loads(json.dumps(dataclasses.asdict(report), allow_nan=False))
    assert told["tensors"][0]["norm_ratio"] == 2.0


def made_report(layers: int = 4, packed: bool = True) -> ConflictReport:
    generator = np.random.default_rng(1)
    names = ["model.embed_tokens.weight"]
    names += [f"model.layers.{i}.{kind}.weight" for i in range(layers) for kind in ("self_attn.q_proj", "mlp.up_proj")]
    tensors = []
    for number, name in enumerate(names):
        base = torch.from_numpy(generator.normal(size=64).astype(np.float32))
        shared = torch.from_numpy(generator.normal(size=64).astype(np.float32))
        models = [base + 0.02 * shared * (k + 1) + 0.02 * torch.randn(64, generator=torch.Generator().manual_seed(k))
                  for k in range(3)]  # fmt: skip
        tensors.append(
            dataclasses.replace(
                measured(base, models, name=name), requantization_error=0.01 * number if packed else None
            )
        )
    return ConflictReport(tuple(tensors))


def test_the_picture_has_a_map_for_each_quantity() -> None:
    report = made_report()
    figure = conflict_figure(report)
    maps = [axes for axes in figure.axes if axes.get_title(loc="left")]
    assert [axes.get_title(loc="left") for axes in maps] == TITLES
    cells = maps[0].images[0].get_array()
    assert cells.shape == (3, 5)  # kinds, layers and what is outside them
    assert cells[1, 2] == pytest.approx(report.tensors[5].mean_cosine)
    assert [label.get_text() for label in maps[0].get_yticklabels()] == ["embed_tokens", "q_proj", "up_proj"]
    plain = conflict_figure(made_report(packed=False))
    assert [a.get_title(loc="left") for a in plain.axes if a.get_title(loc="left")] == TITLES[:3]


def test_nothing_to_show_is_a_picture_too() -> None:
    figure = conflict_figure(ConflictReport(()))
    figure.draw_without_rendering()
    assert [axes.get_title(loc="left") for axes in figure.axes if axes.get_title(loc="left")] == TITLES[:1]


def test_without_matplotlib_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"quantlab\[plot\]"):
        conflict_figure(made_report())
