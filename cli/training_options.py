"""Options of the commands that train on a user's rows, and what these become."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from quantlab.cli.options import PromptLayout as PromptLayout

if TYPE_CHECKING:
    from quantlab.training.finetune_settings import FinetuneSettings
    from quantlab.training.prepared import DataSettings

Settings = TypeVar("Settings")

Data = Annotated[
    Path, typer.Argument(help="jsonl or txt file, or folder with train, valid and test.", show_default=False)
]
RsLora = Annotated[bool, typer.Option("--rslora", help="Scale by alpha / sqrt(rank).")]
SampleTokens = Annotated[int, typer.Option("--context", help="Most tokens of a sample.")]
Packing = Annotated[bool, typer.Option("--packing", help="Fill windows with several whole samples.")]
BatchSize = Annotated[int, typer.Option("--batch-size", "-b", help="Samples of a forward pass.")]
Accumulation = Annotated[int, typer.Option("--accumulation", help="Forward passes of a step.")]
Epochs = Annotated[float, typer.Option("--epochs", help="Passes over the data.")]
MaxSteps = Annotated[int | None, typer.Option("--max-steps", help="Instead of epochs.", show_default=False)]
Scheduler = Annotated[str, typer.Option("--scheduler", help="cosine, linear, constant or constant_with_warmup.")]
Warmup = Annotated[float, typer.Option("--warmup", help="Share of the steps in which the rate grows.")]
WeightDecay = Annotated[float, typer.Option("--weight-decay", help="AdamW's.")]
GradientClip = Annotated[float, typer.Option("--gradient-clip", help="The gradient's greatest norm.")]
GradientCheckpointing = Annotated[
    bool | None,
    typer.Option(
        "--gradient-checkpointing/--no-gradient-checkpointing",
        help="Save memory by computing layers twice.",
        show_default="from 100 M parameters on",
    ),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, or an accelerator such as cuda.")]
EvalSplit = Annotated[
    float | None,
    typer.Option(
        "--eval-split", help="Rows to hold out: a share, or a number.", show_default="0.05, if there is no valid file"
    ),
]
EvalEvery = Annotated[
    int | None, typer.Option("--eval-every", help="Steps between evaluations and checkpoints.", show_default="1/10")
]
EarlyStopping = Annotated[
    int | None, typer.Option("--early-stopping", help="Stop after so many evaluations without gain; keep the best.")
]
ReportTo = Annotated[str, typer.Option("--report-to", help="none, tensorboard or wandb.")]
PromptField = Annotated[str | None, typer.Option("--prompt-field", help="Rows' field for the prompt.")]
CompletionField = Annotated[str | None, typer.Option("--completion-field", help="... for the completion.")]
TrainPrompts = Annotated[bool, typer.Option("--train-prompts", help="Loss on prompts, too.")]
LastTurnOnly = Annotated[bool, typer.Option("--last-turn-only", help="Learn the last answer of a chat.")]
TooLong = Annotated[str, typer.Option("--too-long", help="Rows beyond the context: error, cut or skip.")]
Template = Annotated[
    Path | None, typer.Option("--chat-template", help="File, instead of the model's own.", show_default=False)
]
EndToken = Annotated[
    str | None, typer.Option("--end-token", help="Ends texts, instead of the tokenizer's own, as '<|im_end|>'.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with what OUT.training holds.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")]


def settings_from(kind: type[Settings], options: Mapping[str, Any], **others: Any) -> Settings:
    """A settings dataclass of a command's options that have its fields' names, and of `others`."""
    assert dataclasses.is_dataclass(kind)
    names = {field.name for field in dataclasses.fields(kind)} & options.keys()
    return kind(**{name: options[name] for name in names - others.keys()}, **others)


def training_settings(options: Mapping[str, Any], **others: Any) -> FinetuneSettings:
    """What the trainer is told by a command's options."""
    from quantlab.training.finetune_settings import FinetuneSettings

    return settings_from(FinetuneSettings, options, logger=options["report_to"], **others)


def row_settings(options: Mapping[str, Any]) -> DataSettings:
    """What becomes of the rows, by a command's options."""
    from quantlab.training.prepared import DataSettings

    return settings_from(
        DataSettings, options, held_out=options["eval_split"], completion_only=not options["train_prompts"]
    )


def own_template(file: Path | None) -> str | None:
    """The chat template that takes the place of the model's own."""
    from quantlab.checkpoint.chat_text import read_template

    return None if file is None else read_template(file)
