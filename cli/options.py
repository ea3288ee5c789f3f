"""Options that several commands share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer


def _apply_config(context: typer.Context, path: Path | None) -> None:
    """Let a YAML file of option names and values stand in for options that the command line leaves out."""
    if path is None:
        return
    import yaml

    from quantlab.errors import InputError

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a YAML file: {' '.join(str(error).split())}") from None
    known = {parameter.name for parameter in context.command.params} - {"config", None}
    values = {str(key).replace("-", "_"): value for key, value in data.items()} if isinstance(data, dict) else None
    if values is None:
        raise InputError(f"{path}: must hold option names and values")
    if unknown := sorted(set(values) - known):
        raise InputError(f"{path}: unknown options {', '.join(unknown)} (see: {context.command_path} --help)")
    context.default_map = {**(context.default_map or {}), **values}


def _check_engine(engine: str) -> str:
    from quantlab.errors import InputError

    if engine not in ENGINES:
        raise InputError(f"--engine {engine}: choose one of: {', '.join(ENGINES)}")
    return engine


def weighted_adapters(given: Sequence[str] | None, option: str = "--adapter") -> list[tuple[Path, float]]:
    """The folders and weights that `DIR` and `DIR=WEIGHT` name; a text that is a folder itself has weight 1."""
    return [_weighted_adapter(text, option) for text in given or ()]


def _weighted_adapter(text: str, option: str) -> tuple[Path, float]:
    from quantlab.errors import InputError

    folder, equals, number = text.rpartition("=")
    if not equals or Path(text).exists():
        return Path(text), 1.0
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not folder or not math.isfinite(weight):
        raise InputError(f"{option} {text}: no such folder, and behind = no weight; expected DIR or DIR=WEIGHT")
    return Path(folder), weight


def _with_line_breaks(text: str | None) -> str | None:
    return None if text is None else text.replace("\\n", "\n")


ENGINES = ("auto", "native", "torch")

Model = Annotated[str, typer.Argument(help="Model folder, GGUF file or hub id.", show_default=False)]
Text = Annotated[Path, typer.Argument(help="UTF-8 text file; lines <|endoftext|> part documents.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Adapters = Annotated[
    list[str] | None,
    typer.Option("--adapter", metavar="DIR[=WEIGHT]", help="Apply an adapter beside the weights; may be repeated."),
]
Threads = Annotated[
    int | None, typer.Option("--threads", "-t", help="Threads to compute with.", show_default="all cores")
]
Context = Annotated[int, typer.Option("--context", help="Tokens per window.")]
Stride = Annotated[
    int | None, typer.Option("--stride", help="Move windows on by this many tokens.", show_default="a whole window")
]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config", "-c", help="YAML file of options; the command line wins.", is_eager=True, callback=_apply_config
    ),
]
Engine = Annotated[str, typer.Option("--engine", help="auto, native or torch.", callback=_check_engine)]
Windows = Annotated[
    str, typer.Option("--windows", help="documents, or llama: contexts as llama.cpp's llama-perplexity cuts them.")
]
PromptLayout = Annotated[
    str | None,
    typer.Option(
        "--prompt-layout",
        help=r"Text around a prompt, such as 'Question: {prompt}\nAnswer:'; \n is a line break.",
        callback=_with_line_breaks,
    ),
]
Activations = Annotated[str, typer.Option("--activations", help="f32, or int8 as generation has it (native engine).")]
