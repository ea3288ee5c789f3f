"""`quantlab pretrain CONFIG DATA OUT`."""

from __future__ import annotations

import sys
from json import loads
from pathlib import Path
from typing import Annotated

import typer
from quantlab.cli.console import print_json, progress, quiet_transformers, use_threads
from quantlab.cli.options import Config, Json, Threads


def pretrain(
    recipe: Annotated[Path, typer.Argument(metavar="CONFIG", help="Recipe, a YAML file.", show_default=False)],
    data: Annotated[Path, typer.Argument(help="Text file, or folder with train.txt[.gz].", show_default=False)],
    out: Annotated[Path, typer.Argument(help="Folder to make; OUT.training holds work at hand.", show_default=False)],
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in OUT.training.")] = False,
    tokens: Annotated[int | None, typer.Option("--tokens", help="Instead of the recipe's number of tokens.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Instead of the recipe's seed.")] = None,
    format: Annotated[
        str | None,
        typer.Option(
            "--format",
            "-f",
            help="Of linear weights, trained through its blocks: ternary, q4_1, ...; float.",
            show_default="the recipe's",
        ),
    ] = None,
    threads: Threads = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Train a model from scratch."""
    use_threads(threads)
    quiet_transformers()
    from quantlab.errors import one_line
    from quantlab.training import pretrain as training
    from quantlab.training.failures import TrainingFailedError

    try:
        with progress("training", "tokens") as report:
            result = training.pretrain(
                recipe, data, out, resume=resume, tokens=tokens, seed=seed, format=format, progress=report
            )
    except TrainingFailedError as error:
        print(f"quantlab: {one_line(str(error))}", file=sys.stderr)
        raise typer.Exit(1) from None
    _draw_loss(out, result.training_tokens // result.steps)
    if json:
        print_json(result)
        return
    print(
        f"{result.parameters / 1e6:.1f} M parameters, {result.training_tokens / 1e6:.1f} M tokens in {result.steps} "
        f"steps at {result.tokens_per_second:.0f} tokens/s\n"
        f"loss {result.train_loss:.4f} in training, {result.eval_loss:.4f} nats per token held out\nwritten: {out}"
    )


def _draw_loss(out: Path, tokens_per_step: int) -> None:
    """Put loss.png beside the model, if matplotlib is there; the figures are in training_log.json either way."""
    from quantlab.errors import InputError
    from quantlab.evaluation.plots import loss_curve

    try:
        loss_curve(loads((out / "training_log.json").read_text(encoding="utf-8")), out / "loss.png", tokens_per_step)
    except InputError as error:
        print(f"no loss.png: {error}", file=sys.stderr)
