"""benchmarks/adapters.py: its ratios and their intervals, and one run on a tiny model."""

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
    import adapter_statistics

    return adapter_statistics


def test_of_one_seed_it_is_the_ratio_over_samples(statistics, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from quality_statistics import ratio

    random = np.random.default_rng(0)
    above, below = random.normal(2, 1, 40), random.gamma(4, size=40)
    found = statistics.crossed_ratio(above[None], below[None])
    assert (found.value, found.stderr) == pytest.approx(ratio(above, below), rel=1e-12)
    assert found.high - found.value == pytest.approx(2.0227 * found.stderr, rel=1e-4)  # Student's t, 39 degrees
    assert found.value - found.low == pytest.approx(found.high - found.value, rel=1e-12)


def test_seeds_and_samples_by_hand(statistics):
    # the mean is 3; samples add up to -2 and 2 apart from it, seeds to -4 and 4
    found = statistics.crossed_ratio(np.array([[1.0, 1.0], [3.0, 7.0]]), np.ones((2, 2)))
    samples, seeds = 2 * (2**2 + 2**2) / 16, 2 * (4**2 + 4**2) / 16
    assert found.value == 3
    assert found.stderr == pytest.approx((samples + seeds) ** 0.5)
    # Satterthwaite: 25 / 17 degrees of freedom, rounded down to 1
    assert found.high - 3 == pytest.approx(12.7062 * found.stderr, rel=1e-5)


def test_quantiles(statistics):
    tabled = {1: 12.7062, 2: 4.3027, 3: 3.1824, 10: 2.2281, 100: 1.9840}
    for freedom, value in tabled.items():
        assert statistics.quantile(0.975, freedom + 0.5) == pytest.approx(value, rel=0.01)


def test_what_never_varies_has_no_error(statistics):
    gains = np.random.default_rng(1).gamma(2.0, size=(3, 20))
    found = statistics.recovery(np.full(20, 50.0), 50 - gains, 50 - gains)
    assert found.value == 1
    assert found.low == found.high == 1


def test_recovery_and_gain(statistics):
    before = np.array([10.0, 20.0])
    unfused, fused = before - [[1.0, 3.0]], before - [[0.5, 1.5]]
    assert statistics.recovery(before, unfused, fused).value == 0.5
    assert statistics.recovery(before, before + np.array([[1.0, -1.0]]), fused) is None
    assert statistics.gain(before, unfused, np.array([3.0, 5.0])).value == 0.5


def test_intervals_cover(statistics):
    random, hits = np.random.default_rng(3), 0
    draws = 600
    for _ in range(draws):
        noise = random.normal(0, 0.3, (3, 1)) + random.normal(0, 1, (1, 30)) + random.normal(0, 0.5, (3, 30))
        found = statistics.crossed_ratio(1 + noise, np.ones((3, 30)))
        hits += found.low <= 1 <= found.high
    assert hits / draws > 0.93


def test_it_runs_and_goes_on(make_model, prose, tmp_path, monkeypatch, capsys):
    pytest.importorskip("accelerate")
    model = make_model(tmp_path / "model", "llama")
    rows = tmp_path / "sums.jsonl"
    sums = [{"question": f"{a} and {b}", "answer": f"{a + b}"} for a in range(5) for b in range(3)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in sums))
    arguments = [model, "--data", f"sums={rows},question,answer,Add {{prompt}}\\n", "--work", tmp_path / "work",
                 "--seeds", 2, "--levels", "16,4", "--held-out", 4, "--context", 64, "--batch-size", 2,
                 "--max-steps", 4, "--learning-rate", 0.02, "--calibration", prose, "--calibration-samples", 8,
                 "--threads", 1]  # fmt: skip
    monkeypatch.syspath_prepend(BENCHMARKS)
    reports = []
    for name in ("first.json", "second.json"):
        command = ["adapters.py", *arguments, "--json", tmp_path / name]
        monkeypatch.setattr(sys, "argv", [str(word) for word in command])
        runpy.run_path(str(BENCHMARKS / "adapters.py"), run_name="__main__")
        reports.append(json.loads((tmp_path / name).read_text()))
    assert "gates hold" in capsys.readouterr().out
    check_trained(reports[0]["trained"])
    check_fused({(row["run"], row["fused"]): row for row in reports[0]["fused"]})
    assert reports[1] == reports[0]


def check_trained(rows):
    by_run = {(row["run"], row["activations"]): row for row in rows}
    assert by_run["sums, float, LoRA", "float"]["seeds"] == 2
    assert by_run["sums, q4_1-levels4, QLoRA", "int8"]["seeds"] == 1
    for row in rows:
        assert row["gain"]["value"] == pytest.approx(row["before"] - row["after"], abs=1e-9)


def check_fused(rows):
    for base in ("q4_1", "q4_1-levels4"):
        for method in ("block-sum", "merge-aware"):
            exact = rows[f"sums, {base}, {method}", "exact"]
            assert exact["exact"] is True
            assert exact["differing_bytes"] == 0
            assert exact["logits_int8"] == exact["logits_float"] == 0
            assert exact["recovery_int8"]["value"] == exact["recovery_float"]["value"] == 1
        for way in ("rtn", "search"):
            again = rows[f"sums, {base}, QLoRA", way]
            assert again["exact"] is False
            assert again["logits_float"] > 0
    side = rows["sums, q4_1, block-sum", "side branch"]
    assert 0 < side["logits_float"] < 0.1
