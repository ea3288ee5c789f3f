"""benchmarks/merge_ladder.py: its tasks and shares, and one run on a tiny model."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY_SPLITS = {"train": 24, "dev": 4, "test": 6}


@pytest.fixture
def ladder(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import merge_ladder

    return merge_ladder


@pytest.fixture
def tasks(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import merge_tasks

    return merge_tasks


def test_no_row_is_in_two_splits(tasks):
    for task in (*tasks.TASKS, tasks.COMPOSITE):
        splits = tasks.rows(task)
        assert {name: len(rows) for name, rows in splits.items()} == tasks.SPLITS
        assert len({row.prompt for rows in splits.values() for row in rows}) == sum(tasks.SPLITS.values())
        assert splits == tasks.rows(task)


def test_answers_are_right(tasks):
    assert tasks.pig_latin("the owl is in the school") == "ethay owlay isay inay ethay oolschay"
    for row in tasks.rows("sums")["test"]:
        had, found = (tasks.NUMBERS.index(word) for word in row.prompt.split() if word in tasks.NUMBERS)
        assert tasks.NUMBERS.index(row.completion.strip()) == had + found
    for row in tasks.rows("where")["test"]:
        name, place = row.prompt.split()[-1].strip("?"), row.completion.split()[-1]
        assert f"{name} is in the {place}." in row.prompt


def test_shares_by_hand(ladder):
    losses = {name: ladder.Losses(np.array(sums), np.array([2.0, 2.0]))
              for name, sums in (("base", [8.0, 12.0]), ("tuned", [2.0, 6.0]), ("merged", [5.0, 9.0]))}  # fmt: skip
    found = ladder.Ladder.__new__(ladder.Ladder)
    found.base, found.tuned = ({"test": dict.fromkeys(ladder.TASKS, losses[name])} for name in ("base", "tuned"))
    rung = ladder.Rung("merged", 1.0, dict.fromkeys(ladder.TASKS, losses["merged"]), 1.0, inside=True)
    assert found.share(rung.losses, "test") == 0.5
    assert found.drawn(rung) == pytest.approx(0.5)  # whichever rows: both have half of the gain


@pytest.fixture
def tiny(ladder, tasks, make_model, tmp_path, monkeypatch):
    """Few rows, steps and strengths; how to run a script, which gives the JSON that it writes."""
    pytest.importorskip("accelerate")
    import merge_work

    monkeypatch.setattr(tasks, "SPLITS", TINY_SPLITS)
    tuning = dataclasses.replace(merge_work.TUNING, batch_size=2, max_steps=2, eval_every=2, learning_rate=0.01)
    monkeypatch.setattr(merge_work, "TUNING", tuning)
    monkeypatch.setattr(merge_work, "CONTEXT", 512)  # the tiny tokenizer makes many tokens
    monkeypatch.setattr(merge_work, "GENERAL_WINDOWS", 2)
    fewer = [dataclasses.replace(row, strengths=row.strengths[:3]) for row in ladder.METHODS]
    monkeypatch.setattr(ladder, "METHODS", fewer)
    monkeypatch.setattr(ladder, "NEGATED", ladder.NEGATED[:1])
    model = make_model(tmp_path / "model", "llama")

    def run(module, *arguments):
        command = [f"{module.__name__}.py", model, "--work", tmp_path / "work", "--threads", 1, *arguments,
                   "--json", tmp_path / "said.json"]  # fmt: skip
        monkeypatch.setattr(sys, "argv", [str(word) for word in command])
        module.main()
        return json.loads((tmp_path / "said.json").read_text())

    return run


def test_it_runs_and_goes_on(tiny, ladder, tasks, prose, capsys):
    arguments = "--general", prose, "--methods", "average,task_arithmetic,regmean,iso_c"
    said = tiny(ladder, *arguments)
    assert "lambda inside (0, 1.5)" in capsys.readouterr().out
    assert set(said["ladder"]) == {"average", "task_arithmetic", "regmean", "iso_c"}
    assert set(said["negation"]) == set(tasks.TASKS)
    assert said["packed"]["ratio"] > 0
    assert abs(said["packed"]["correlation"]) < 1
    assert tiny(ladder, *arguments) == said


def test_searches_run_and_go_on(tiny, monkeypatch, prose):
    pytest.importorskip("optuna")
    import merge_search

    monkeypatch.setattr(merge_search, "STEPS", 2)
    monkeypatch.setattr(merge_search, "GRID", [0.0, 0.5])
    arguments = "--general", prose, "--trials", 2, "--path-trials", 2, "--rows", 24, "--scalings", "slots,none"
    said = tiny(merge_search, *arguments)
    assert said["search"]["PS"]["less_ps"] == 0
    paths = [f"PS+DFS, depth, seed 0, W: {way}" for way in ("slots", "slots set to 1", "none")]
    assert [name for name in said["search"] if name.startswith("PS+DFS")] == paths
    for name in (paths[0], paths[2]):
        assert said["search"][name]["dev"] <= said["search"]["PS"]["dev"]  # where the search begins
    assert {"removing_w_costs", "removing_w_reach"} <= said["search"][paths[0]].keys()
    assert set(said["learned"]["losses"]) == {"grid", "learned"}
    assert tiny(merge_search, *arguments) == said
