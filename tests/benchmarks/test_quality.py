"""benchmarks/quality.py: its ratios and their errors, and one run on a tiny model."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from quantlab import compare
from quantlab.divergence import mean_and_stderr

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def statistics(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import quality_statistics

    return quality_statistics


def test_a_ratio_and_its_error_by_hand(statistics):
    value, error = statistics.ratio(np.array([1.0, 2.0, 6.0]), np.array([2.0, 4.0, 6.0]))
    assert value == 0.75
    # residuals -0.5, -1, 1.5: squares 3.5, times 3 / 2, over the square of 12
    assert error == pytest.approx((3.5 * 1.5) ** 0.5 / 12, rel=1e-12)


def test_what_is_the_same_in_every_window_has_no_error(statistics):
    base = np.random.default_rng(0).gamma(2.0, size=20)
    assert statistics.ratio(0.25 * base, base) == (0.25, pytest.approx(0, abs=1e-15))


def test_over_counts_it_is_the_error_of_a_mean(statistics):
    random = np.random.default_rng(1)
    windows = [random.normal(size=size) for size in (3, 9, 5, 1)]
    sums, counts = np.array([w.sum() for w in windows]), np.array([float(len(w)) for w in windows])
    assert statistics.ratio(sums, counts) == pytest.approx(mean_and_stderr(windows), rel=1e-12)


def test_the_error_is_that_of_repeated_draws(statistics):
    random = np.random.default_rng(2)
    base = random.gamma(4.0, size=(4000, 60))
    other = base * random.normal(0.3, 0.05, size=base.shape)
    found = [statistics.ratio(a, b) for a, b in zip(other, base, strict=True)]
    assert np.mean([error for _, error in found]) == pytest.approx(np.std([value for value, _ in found]), rel=0.05)


def test_it_runs_and_goes_on(make_model, prose, tmp_path, monkeypatch, capsys):
    model = make_model(tmp_path / "model", "llama")
    text = tmp_path / "text.txt"
    text.write_text(prose.read_text(encoding="utf-8")[:1500], encoding="utf-8")
    arguments = [model, text, "--calibration", prose, "--work", tmp_path / "work", "--tokens", 1024, "--context", 64,
                 "--seeds", 2, "--methods", "rtn,search", "--levels", "16,4", "--threads", 1]  # fmt: skip
    monkeypatch.syspath_prepend(BENCHMARKS)
    reports = []
    for name in ("first.json", "second.json"):
        command = ["quality.py", *arguments, "--json", tmp_path / name]
        monkeypatch.setattr(sys, "argv", [str(word) for word in command])
        runpy.run_path(str(BENCHMARKS / "quality.py"), run_name="__main__")
        reports.append(json.loads((tmp_path / name).read_text()))
    assert "x min-max" in capsys.readouterr().out
    rtn, search = reports[0]["levels 16"]
    assert rtn["ratio"] == 1
    assert len(search["ratios of seeds"]) == 2
    assert search["bytes"] == rtn["bytes"]
    compared = compare(model, tmp_path / "work" / "rtn-q4_1.gguf", text, context=64)
    for ours, theirs in (("kld", "kld_mean"), ("kld_stderr", "kld_stderr"), ("perplexity", "perplexity_b")):
        assert rtn[ours] == pytest.approx(getattr(compared, theirs), rel=1e-12)
    assert rtn["same_top"] == compared.same_top
    assert reports[0]["levels 4"][0]["kld"] > 4 * rtn["kld"]
    assert reports[1] == reports[0]
