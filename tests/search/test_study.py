"""Studies that processes share: every trial is scored once, and the dead do not hold up the living."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from quantlab.errors import InputError
from quantlab.search.genome import Gene
from quantlab.search.study import WORKER, Study, Trial, open_storage, process_exists, recent_mean

GENES = (Gene("x", 0.0, 1.0), Gene("y", -2.0, 4.0))
WHERE = {"journal": "{}/deep/study.journal", "sqlite": "sqlite:///{}/study.db"}


def scored(study: Study, budget: int, score=lambda values: -sum(each * each for each in values.values())) -> None:
    while (trial := study.ask(budget)) is not None:
        study.tell(trial, score(trial.values), stderr=0.5)


@pytest.mark.parametrize("sampler", ["cmaes", "tpe", "random"])
def test_draws_depend_on_seed_and_number_alone(sampler, tmp_path):
    """Stopped and opened again, a search draws what it draws in one go."""
    found = []
    for name, budgets in (("once", (14,)), ("twice", (5, 14))):
        for budget in budgets:
            study = Study(open_storage(tmp_path / name), "study", GENES, sampler, seed=3)
            scored(study, budget)
        found.append([trial.values for trial in study.finished()])
    assert found[0] == found[1]
    assert len({tuple(values.values()) for values in found[0]}) == 14
    assert all(gene.low <= values[gene.name] <= gene.high for values in found[0] for gene in GENES)


def test_cma_es_begins_in_the_middle_with_a_sixth(tmp_path):
    """The first generation, 4 + floor(3 ln 2) = 6 draws, has its mean and spread near the middle and a sixth."""
    draws = []
    for seed in range(40):
        study = Study(open_storage(tmp_path / str(seed)), "study", GENES, "cmaes", seed)
        scored(study, 3)
        draws += [(t.values["x"] - 0.5) * 6 for t in study.finished()]
        draws += [(t.values["y"] - 1.0) for t in study.finished()]
    mean = sum(draws) / len(draws)
    spread = (sum((each - mean) ** 2 for each in draws) / len(draws)) ** 0.5
    assert abs(mean) < 0.2
    assert 0.85 < spread < 1.1


@pytest.mark.parametrize("kind", WHERE)
def test_a_study_is_kept(kind, tmp_path):
    """Scores, failures and notes come back; what was given up does not count; the start is drawn first, once."""
    where = WHERE[kind].format(tmp_path)
    study = Study(open_storage(where), "one", GENES)
    study.begin_with({"x": 0.25, "y": 3.0})
    first, second, third = (study.ask(9) for _ in range(3))
    study.tell(first, -1.5, stderr=0.25)
    study.fail(second, "no number\n")
    study.give_up(third)
    study.set_note("baselines", [1, None])
    again = Study(open_storage(where), "one", GENES)
    again.begin_with({"x": 0.25, "y": 3.0})
    one, two = again.finished()
    assert (one.number, one.values, one.score, one.stderr) == (0, {"x": 0.25, "y": 3.0}, -1.5, 0.25)
    assert (two.number, two.score, two.failure) == (1, None, "no number\\n")
    assert again.note("baselines") == [1, None]
    assert again.best() == one
    assert again.ask(9).values != one.values
    assert again.agree("winner", 7) == study.agree("winner", 8) == 7
    assert Study(open_storage(where), "other", GENES).finished() == []


def test_two_trials_of_one_score():
    """The first one wins."""
    study = object.__new__(Study)
    study.finished = lambda: [Trial(0, {}, 1.0), Trial(1, {}, 2.0), Trial(2, {}, 2.0), Trial(3, {})]
    assert study.best().number == 1
    assert recent_mean(study.finished(), 2) == 2.0
    study.finished = lambda: [Trial(0, {}, failure="it is NaN")]
    with pytest.raises(InputError, match="no candidate could be scored: it is NaN"):
        study.best()


WORK = """
import os, sys, time
from pathlib import Path
from quantlab.search.genome import Gene
from quantlab.search.study import Study, open_storage, quiet_optuna
meeting, workers = Path(sys.argv[2]), int(sys.argv[3])
(meeting / str(os.getpid())).touch()
while len(list(meeting.iterdir())) < workers:
    time.sleep(0.02)
with quiet_optuna():
    study = Study(open_storage(sys.argv[1]), "shared", (Gene("x", 0, 1), Gene("y", -2, 4)))
while (trial := study.ask(12)) is not None:
    time.sleep(0.1)
    study.tell(trial, trial.values["x"])
print(len(study.finished()))
"""


@pytest.mark.parametrize("kind", WHERE)
def test_two_processes_share_a_study(kind, tmp_path):
    where = WHERE[kind].format(tmp_path)
    (tmp_path / "meeting").mkdir()
    command = [sys.executable, "-c", WORK, where, str(tmp_path / "meeting"), "2"]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    ends = [worker.communicate(timeout=300) for worker in workers]
    assert [(worker.returncode, error) for worker, (_, error) in zip(workers, ends, strict=True)] == [(0, "")] * 2
    study = Study(open_storage(where), "shared", GENES)
    trials = study.finished()
    assert [trial.number for trial in trials] == list(range(len(trials)))
    assert 12 <= len(trials) <= 13  # both may ask for the last one at the same moment
    assert len({tuple(trial.values.values()) for trial in trials}) == len(trials)
    names = {each.user_attrs[WORKER].rpartition(":")[2] for each in study._study.trials}
    assert names == {str(worker.pid) for worker in workers}


def test_a_killed_process_holds_nobody_up(tmp_path):
    """Its trial is neither waited for nor counted."""
    where = str(tmp_path / "journal")
    (tmp_path / "meeting").mkdir()
    code = WORK.replace("time.sleep(0.1)", "os._exit(9)")
    command = [sys.executable, "-c", code, where, str(tmp_path / "meeting"), "1"]
    assert subprocess.run(command, check=False).returncode == 9
    study = Study(open_storage(where), "shared", GENES)
    scored(study, 2)
    assert [trial.number for trial in study.finished()] == [1, 2]
    assert process_exists(os.getpid())


def test_storages_that_cannot_be_opened(tmp_path):
    (tmp_path / "file").write_text("no journal\nof any search\n")
    wrong = {
        f"sqlite:///{tmp_path}/absent/study.db": "cannot be opened: ",
        "nosuchsql://user:secret@host/x": r"--storage nosuchsql://user:\*\*\*@host/x: cannot be opened: ",
        str(tmp_path / "file"): "is no journal of a search",
        str(tmp_path / "file" / "below"): "cannot be written: ",
    }
    for where, reason in wrong.items():
        with pytest.raises(InputError, match=reason) as refused:
            open_storage(where)
        assert "secret" not in str(refused.value)


def test_without_optuna(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(InputError, match=r"optuna is not installed; install it with: pip install 'quantlab\[search\]'"):
        open_storage(tmp_path / "journal")
