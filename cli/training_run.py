"""A training on a user's rows as commands run it: a bar, how to go on after a stop, the curve of the loss."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from json import loads
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import typer
from quantlab.cli.console import print_json, progress, quiet_transformers, use_threads

if TYPE_CHECKING:
    from quantlab.training.finetune import FinetuneResult
    from quantlab.training.qat import QatResult
    from quantlab.training.trainer import Progress

    Result = TypeVar("Result", FinetuneResult, QatResult)


def run_training(
    out: Path, threads: int | None, json: bool, train: Callable[[Progress], Result], tell: Callable[[Result], None]
) -> None:
    """Call `train` with a progress bar's callback, and print what came of it: as JSON, or by `tell`."""
    use_threads(threads)
    quiet_transformers()
    from quantlab.errors import one_line
    from quantlab.training.failures import TrainingFailedError
    from quantlab.training.surroundings import is_first_process

    try:
        with progress("training", "tokens") as report:
            result = train(report)
    except (KeyboardInterrupt, SystemExit):
        _say_how_to_resume(out)
        raise
    except TrainingFailedError as error:
        print(f"quantlab: {one_line(str(error))}", file=sys.stderr)
        raise typer.Exit(1) from None
    if not is_first_process():  # of several, one speaks
        return
    if out.is_dir():
        _draw_loss(out, result.training_tokens // max(1, result.steps))
    if json:
        print_json(result)
    else:
        tell(result)


def _say_how_to_resume(out: Path) -> None:
    """On stderr, if an interrupted run left something to go on with."""
    folder = out.with_name(out.name + ".training")
    if folder.is_dir():  # it is gone where no checkpoint was complete
        print(
            f"note: checkpoints are kept in {folder}: the same command with --resume goes on from there",
            file=sys.stderr,
        )


def _draw_loss(out: Path, tokens_per_step: int) -> None:
    """Put loss.png beside the result, if matplotlib is there; the figures are in training_log.json either way."""
    from quantlab.errors import InputError
    from quantlab.evaluation.plots import loss_curve

    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells of its caches
    try:
        log = loads((out / "training_log.json").read_text(encoding="utf-8"))["log"]
        loss_curve(log, out / "loss.png", tokens_per_step)
    except (InputError, OSError) as error:  # the result is complete without it
        print(f"note: no loss.png: {error}", file=sys.stderr)
