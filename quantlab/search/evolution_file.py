"""What a search found, and the file beside its model that tells it, with every trial."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantlab.checkpoint.atomic import atomic_file
from quantlab.search.study import Trial

HISTORY_FILE = "evolution.json"


@dataclass(frozen=True)
class JudgedScore:
    """On text and tasks that the search does not see; see `fitness.Score`."""

    score: float
    stderr: float | None


@dataclass(frozen=True)
class EvolveResult:
    """What a search found. Higher scores are better.

    Attributes:
        best_score: of the best candidate, by what the search sees: the best of many draws, which flatters it.
        baseline_scores: likewise, of each model, of the base, and of a merge without tuning ("untuned"); for paths
            through a merge also of that merge ("best merge").
        trials: candidates of all processes; `failed` of them could not be scored.
        config: the file with the winner's merge config.
        layers: of the winner.
        test_scores: of "best" and of all baselines; None without anything to judge by.
        notes: what the user should know, a line each.
    """

    best_score: float
    best_stderr: float | None
    baseline_scores: Mapping[str, float]
    trials: int
    failed: int
    config: str
    space: str
    layers: int
    test_scores: Mapping[str, JudgedScore] | None
    seconds: float
    notes: tuple[str, ...]


def history_of(out: Path) -> dict[str, Any] | None:
    """What a search has written beside the model; None if there is nothing."""
    try:
        history = json.loads((out / HISTORY_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return history if isinstance(history, dict) and "search" in history else None


def result_of(history: dict[str, Any]) -> EvolveResult:
    """The result that another process of the same search has written."""
    values = {field.name: history[field.name] for field in dataclasses.fields(EvolveResult)}
    judged = values["test_scores"]
    values["test_scores"] = judged and {name: JudgedScore(**score) for name, score in judged.items()}
    values["notes"] = (*values["notes"], "another process of this search has written it")
    return EvolveResult(**(values | {"trials": len(history["trials"])}))


def write_history(out: Path, name: str, result: EvolveResult, trials: Sequence[Trial]) -> None:
    """All scores and values, beside the model."""
    rows = [{"number": t.number, "score": t.score, "failure": t.failure, "values": dict(t.values)} for t in trials]
    content = {"search": name, **dataclasses.asdict(result), "trials": rows}
    with atomic_file(out / HISTORY_FILE, replace=True) as path:
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
