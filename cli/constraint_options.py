"""Options that constrain what is generated, and the grammars that they make."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from quantlab.generation.grammars import Grammar

JsonSchema = Annotated[
    Path | None, typer.Option("--json-schema", metavar="FILE", help="Generate JSON that a schema describes.")
]
Regex = Annotated[str | None, typer.Option("--regex", help="Generate a text that a regular expression describes.")]
Choice = Annotated[
    list[str] | None, typer.Option("--choice", metavar="TEXT", help="Generate one of these; to be repeated.")
]
Choices = Annotated[str | None, typer.Option("--choices", metavar="A,B", help="The same, parted by commas.")]
GrammarFile = Annotated[
    Path | None, typer.Option("--grammar", metavar="FILE", help="Generate a text of a grammar in Lark's notation.")
]
ThenJsonSchema = Annotated[
    Path | None,
    typer.Option("--then-json-schema", metavar="FILE", help="Reason freely, then answer by this JSON schema."),
]
ThenRegex = Annotated[str | None, typer.Option("--then-regex", help="The same with a regular expression.")]
ThenChoice = Annotated[
    list[str] | None, typer.Option("--then-choice", metavar="TEXT", help="The same with one of these; to be repeated.")
]
ThenCue = Annotated[
    str,
    typer.Option(
        "--then-cue", help=r"Text between reasoning and answer; \n is a line break.", show_default=r"\nAnswer: "
    ),
]
ReasoningBudget = Annotated[int, typer.Option("--reasoning-budget", help="Tokens of the reasoning at most.")]
CUE = r"\nAnswer: "


def grammar_of(
    json_schema: Path | None,
    regex: str | None,
    choice: Sequence[str] | None,
    choices: str | None = None,
    grammar: Path | None = None,
    *,
    prefix: str = "--",
) -> Grammar | None:
    """What the options of these names ask for; None if none was given.

    Raises:
        InputError: more than one was given, or what it gives is wrong.
    """
    from quantlab.errors import InputError
    from quantlab.generation import grammars

    given = {"json-schema": json_schema, "regex": regex, "choice": choice, "choices": choices, "grammar": grammar}
    names = [f"{prefix}{name}" for name, value in given.items() if value]
    if len(names) > 1:
        raise InputError(f"{names[0]} and {names[1]}: one of them describes the output")
    if json_schema is not None:
        return grammars.read_json_schema(json_schema)
    if regex is not None:
        return grammars.regex_grammar(regex)
    if grammar is not None:
        return grammars.read_grammar(grammar)
    if choice or choices is not None:
        return grammars.choice_grammar(choice or (choices or "").split(","))
    return None
