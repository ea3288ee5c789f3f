"""benchmarks/qat.py and qat_cost.py: one run each on a tiny model."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(monkeypatch, script: str, *arguments: object) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    runpy.run_path(str(BENCHMARKS / script), run_name="__main__")


def test_all_tables_and_a_second_run_that_trains_nothing(make_model, prose, tmp_path, monkeypatch, capsys):
    pytest.importorskip("accelerate")
    model = make_model(tmp_path / "model", "llama")
    arguments = [model, "--data", prose, "--text", prose, "--work", tmp_path / "work", "--seeds", 1,
                 "--formats", "q4_0", "--levels", 4, "--tokens", 4 * 4 * 32, "--context", 32, "--batch-size", 4,
                 "--method", "search", "--learning-rate", 1e-3, "--model-tokens", 10_000, "--threads", 1]  # fmt: skip
    reports = []
    for name in ("first.json", "second.json"):
        run(monkeypatch, "qat.py", *arguments, "--json", tmp_path / name)
        reports.append(json.loads((tmp_path / name).read_text()))
    out = capsys.readouterr().out
    assert "512 tokens a run (5.1 % of those" in out
    assert reports[0] == reports[1]
    found = reports[0]
    targets = ["q4_0", "q4_1-levels4"]
    assert [(row["target"], row["trained"]) for row in found["taught"]] == [
        (target, way) for target in targets for way in ("scales", "full")
    ]
    assert [row["target"] for row in found["alone"]] == targets
    for row in found["taught"]:
        assert row["recovery"]["value"] == pytest.approx(1 - row["kld_qat"] / row["kld_rtn"], abs=1e-9)
    for row in found["alone"]:
        lost = row["loss_ptq"] - row["loss_float"]
        assert row["recovery"]["value"] == pytest.approx((row["loss_ptq"] - row["loss_qat"]) / lost, rel=1e-6)
    assert [row["train"] for row in found["scales"]] == ["scales", "minimums"]
    assert [gate["bound"] for gate in found["gates"]] == [*4 * [">= 0.8"], "<= 1.05"]
    with pytest.raises(SystemExit, match="another training"):
        run(monkeypatch, "qat.py", *arguments, "--context", 16)


def test_the_cost_of_a_step(tmp_path, monkeypatch, capsys):
    pytest.importorskip("accelerate")
    shape = ["--hidden", 64, "--layers", 1, "--heads", 2, "--kv-heads", 1, "--intermediate", 96, "--vocabulary", 128]
    run(monkeypatch, "qat_cost.py", "--formats", "q4_1,q8_0", *shape, "--rounds", 3, "--context", 16, "--threads", 1,
        "--json", tmp_path / "cost.json")  # fmt: skip
    found = json.loads((tmp_path / "cost.json").read_text())
    names = [f"{format}, {part}" for format in ("q4_1", "q8_0") for part in ("step", "forward")]
    assert [row["name"] for row in found["ratios"]] == names
    assert all(len(row["ratios"]) == 3 and row["median"] > 0 for row in found["ratios"])
    assert "<= 1.3" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no multiple of 256"):
        run(monkeypatch, "qat_cost.py", "--formats", "ternary", *shape)
