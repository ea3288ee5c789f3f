"""benchmarks/bitnet.py: its gaps and intervals, and one run of two tiny sizes."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def statistics(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import bitnet_statistics

    return bitnet_statistics


def test_a_gap_by_hand(statistics):
    tokens = np.array([10.0, 30.0])
    base, model = np.array([[20.0, 60.0]]), np.array([[21.0, 63.0], [23.0, 69.0]])  # means: 22 and 66
    assert statistics.gap(model, base, tokens).value == pytest.approx(np.exp(8 / 40) - 1)
    found = statistics.gap(model.mean(axis=0, keepdims=True), base, tokens)
    assert found.interval == pytest.approx((np.exp(0.2) - 1,) * 2)  # every window has the same difference a token


def test_an_interval_is_that_of_the_mean(statistics):
    random = np.random.default_rng(0)
    difference, tokens = random.normal(5, 2, (1, 400)), np.full(400, 50.0)
    low, high = statistics.gap(difference, np.zeros((1, 400)), tokens).interval
    mean, error = difference.mean() / 50, difference.std() / 50 / 20
    assert np.log1p([low, high]) == pytest.approx([mean - 1.96 * error, mean + 1.96 * error], rel=0.01)


def test_seeds_are_drawn_too(statistics):
    """Of windows that are all alike, the interval is that of a mean of seeds."""
    by_seed = np.array([0.10, 0.14, 0.12, 0.20, 0.16, 0.09, 0.11, 0.15])
    tokens = np.full(50, 20.0)
    losses = np.log1p(by_seed)[:, None] * tokens
    found = statistics.gap(losses, np.zeros_like(losses), tokens)
    logs = np.log1p(by_seed)
    assert np.log1p(found.value) == pytest.approx(logs.mean())
    assert np.log1p(found.draws).std() == pytest.approx(logs.std(ddof=1) / np.sqrt(8), rel=0.05)
    assert statistics.gaps_by_seed(losses, np.zeros_like(losses), tokens) == pytest.approx(by_seed)
    apart = statistics.gap(losses, np.zeros_like(losses), tokens, stream=1)
    assert abs(np.corrcoef(found.draws, apart.draws)[0, 1]) < 0.1


def test_a_ratio_is_drawn_together(statistics):
    random = np.random.default_rng(1)
    tokens, windows = np.full(200, 30.0), random.normal(4, 1, (1, 200))
    large, small = (statistics.gap(share * windows, np.zeros_like(windows), tokens) for share in (0.2, 0.1))
    found = statistics.ratio(large, small)
    assert found.value == pytest.approx(np.expm1(0.2 * windows.mean() / 30) / np.expm1(0.1 * windows.mean() / 30))
    assert np.ptp(found.draws) < 0.01 * np.ptp(large.draws / small.draws[::-1])
    behind = statistics.Drawn(-0.1, np.array([-0.1, 0.1]))
    found = statistics.ratio(statistics.Drawn(0.2, np.array([0.2, 0.2])), behind)
    assert (found.value, *found.draws) == (np.inf, np.inf, 2.0)


def test_slope_and_trend(statistics):
    gaps = [statistics.Drawn(value, np.array([value, value, value + wobble])) for value, wobble in
            ((0.3, 0.0), (0.2, 0.0), (0.1, 0.5))]  # fmt: skip
    found = statistics.slope([1e6, 1e7, 1e8], gaps)
    assert found.value == pytest.approx(-0.1)
    assert found.draws == pytest.approx([-0.1, -0.1, 0.15])
    assert statistics.share_shrinking(gaps) == pytest.approx(2 / 3)


def test_sizes_are_those_of_the_linear_layers(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import bitnet
    from bitnet_runs import FLOAT, TERNARY

    monkeypatch.setattr(sys, "argv", ["bitnet.py", "data", "--text", "text"])
    settings = bitnet.settings_of(bitnet.parsed())
    assert [settings.linear_parameters(layers) for layers in (1, 3, 9)] == [540_672, 1_622_016, 4_866_048]
    recipes = [settings.recipe(3, kind) for kind in (FLOAT, TERNARY)]
    assert recipes[1].pop("quantization") == {"format": "ternary"}
    assert recipes[0] == recipes[1]


def test_it_runs_and_goes_on(prose, tmp_path, monkeypatch, capsys):
    pytest.importorskip("accelerate")
    arguments = [prose, "--text", prose, "--work", tmp_path / "work", "--layers", "1,2", "--tokens", 3 * 512,
                 "--intermediate", 256, "--vocabulary", 400, "--context", 32, "--batch-tokens", 512,
                 "--micro-batch-tokens", 512, "--threads", 1]  # fmt: skip
    monkeypatch.syspath_prepend(BENCHMARKS)
    reports = []
    for name in ("first.json", "second.json"):
        command = ["bitnet.py", *arguments, "--json", tmp_path / name]
        monkeypatch.setattr(sys, "argv", [str(word) for word in command])
        runpy.run_path(str(BENCHMARKS / "bitnet.py"), run_name="__main__")
        reports.append(json.loads((tmp_path / name).read_text()))
    assert "slope: " in capsys.readouterr().out
    assert reports[0] == reports[1]
    assert [size["layers"] for size in reports[0]["sizes"]] == [1, 2]
    for size in reports[0]["sizes"]:
        low, high = size["gap_interval"]
        assert low <= size["gap"] <= high
        assert size["naive_gap"] != size["gap"]
        assert size["perplexities"][1] == pytest.approx(size["perplexities"][0] * (1 + size["gap"]))
