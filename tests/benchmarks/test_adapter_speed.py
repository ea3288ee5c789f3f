"""benchmarks/adapter_speed.py: its ratios and gates, and two sides on a tiny shape."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def speed(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import adapter_speed

    return adapter_speed


def measured(speed, **rounds):
    return {side.replace("_", "-"): [speed.Measured(*run) for run in runs] for side, runs in rounds.items()}


def test_gates_take_medians_of_ratios_within_rounds(speed):
    found = measured(speed, peft_bf16=[(10, 100), (20, 100), (40, 100)], bnb_nf4=[(10, 200)] * 3,
                     quantlab_int8=[(15, 55), (20, 50), (44, 60)])  # fmt: skip
    assert speed.ratios(found, "quantlab-int8", "peft-bf16", "tokens_per_second") == [1.5, 1.0, 1.1]
    rows = {row[0]: row[1:] for row in speed.gates_of(found)}
    assert rows["quantlab-int8: peak memory x peft-bf16"] == ("0.550", "<= 0.55", "holds")
    assert rows["quantlab-int8: tokens/s x peft-bf16"] == ("1.100", ">= 1.0, aim 1.3", "holds")
    assert rows["quantlab-int8: tokens/s x bnb-nf4"] == ("2.000", ">= 1.0, aim 1.3", "holds, aim too")


def test_a_missed_gate_and_a_missing_peer(speed):
    found = measured(speed, peft_bf16=[(10, 100)], quantlab_float=[(9, 56)])
    rows = [row[-1] for row in speed.gates_of(found)]
    assert rows == ["MISSED", "MISSED"]
    assert speed.ratio_of(found, "quantlab-float", "bnb-nf4", "tokens_per_second") == ""


def test_both_sides_train_on_the_same_rows(speed, tmp_path, monkeypatch):
    pytest.importorskip("accelerate")
    shape = ["--hidden", 64, "--layers", 2, "--heads", 4, "--kv-heads", 2, "--intermediate", 96, "--vocabulary", 4096]
    command = ["adapter_speed.py", tmp_path, "--steps", 1, "--context", 24, "--rank", 2, "--threads", 1, *shape]
    monkeypatch.setattr(sys, "argv", [str(word) for word in command])
    arguments = speed.parsed()
    speed.prepare(arguments)
    job = speed.Job(tmp_path, arguments.steps, arguments.context, arguments.rank)
    assert np.load(job.ids).shape == (2, 24)
    assert json.loads((tmp_path / "shape.json").read_text())["hidden_size"] == 64
    for side in ("peft-bf16", "quantlab-int8"):
        found = speed.measure(side, job)
        assert found["tokens_per_second"] > 0
        assert found["peak_bytes"] > 1 << 20
    arguments.hidden = 128
    with pytest.raises(SystemExit, match="another shape"):
        speed.prepare(arguments)
