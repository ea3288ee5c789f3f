"""What `quantlab merge --learn` adds to `merge`: which options go together, and a table of what was learned."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantlab.cli.console import print_table, progress

if TYPE_CHECKING:
    from quantlab.search.learning_report import LearnedMergeReport, LearningReport


def check_options(is_learning: bool, own: Mapping[str, Any], others: Mapping[str, Any]) -> None:
    """Refuse options by name: `own` ones without --learn, `others` with it."""
    from quantlab.errors import InputError

    for option, value in (others if is_learning else own).items():
        if value:
            raise InputError(f"{option}: {'does not go with' if is_learning else 'goes with'} --learn")


def learn(
    config: Path,
    out: Path,
    text: Path,
    by: str | None,
    steps: int | None,
    seed: int,
    keep_unproven: bool,
    merging: Mapping[str, Any],
) -> LearnedMergeReport:
    """Learn weights and merge; `merging` holds what `merge_checkpoints` is told, too."""
    from quantlab.cli.console import quiet_transformers

    from quantlab.search.coefficient_training import CoefficientSettings
    from quantlab.search.learned_coefficients import learn_merge

    quiet_transformers()
    given: dict[str, Any] = {"by": by, "steps": steps, "seed": seed}
    settings = CoefficientSettings(**{name: value for name, value in given.items() if value is not None})
    return learn_merge(config, out, text, settings, keep_unproven=keep_unproven, stage=progress, **merging)


def say_how_to_resume(out: Path) -> None:
    """Of learning that was broken off."""
    from quantlab.search.learning_work import learning_folder_of

    folder = learning_folder_of(out)
    if folder.is_dir():
        print(
            f"note: what has been learned is kept in {folder}: the same command with --resume goes on from there",
            file=sys.stderr,
        )


def print_learning(learning: LearningReport) -> None:
    """The learned weights, and what they are worth."""
    rows = [(each.group, each.model, f"{each.start:.4f}", f"{each.learned:.4f}") for each in learning.coefficients]
    print()
    print_table(("weights of", "model", "start", "learned"), rows, title=f"learned in {learning.steps} steps")
    print(
        f"\nloss on {learning.report_windows} windows of their own: {learning.start_loss:.4f} -> "
        f"{learning.learned_loss:.4f} nats per token"
    )
    sign = "proven" if learning.proven else "unproven"
    print(f"gain: {learning.gain:.5f}, 95 % interval {learning.gain_low:.5f} to {learning.gain_high:.5f}: {sign}")
