"""Options of prompt templates, which generate and evaluate share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from quantlab.generation.asking import Manner

TEMPLATE_NAMES = "zero-shot, few-shot, role, cot, few-shot-cot, self-consistency, rag; rag+cot joins two; FILE.jinja"
# Parameters that mean nothing without a template.
OF_TEMPLATES = (
    "trigger", "answer_trigger", "examples", "shots", "role", "rules", "passage_tokens", "ignore_chat_template",
    "answer_type", "passages", "index", "passage_count", "search_method", "save", "overwrite",
)  # fmt: skip

Template = Annotated[
    str | None, typer.Option("--template", metavar="NAME", help=f"Ask by a prompt template: {TEMPLATE_NAMES}.")
]
Trigger = Annotated[
    str | None,
    typer.Option("--trigger", help="What a reasoning begins with.", show_default="Let's think step by step."),
]
AnswerTypeName = Annotated[str, typer.Option("--answer-type", help="number, choice, yes-no, text or free.")]
PassageFiles = Annotated[
    list[Path] | None,
    typer.Option("--passages", metavar="FILE", help="A text, or JSON lines of text and source; may be repeated."),
]
AnswerTrigger = Annotated[
    str | None,
    typer.Option("--answer-trigger", help="What asks for the answer; '' for nothing.", show_default="by type"),
]
ExampleFile = Annotated[
    Path | None,
    typer.Option("--examples", help="Worked examples: JSON lines of question, answer, reasoning.", show_default=False),
]
Shots = Annotated[int, typer.Option("--shots", help="Examples to show.")]
Role = Annotated[str, typer.Option("--role", help="Whom the model is told to be.", show_default="an expert")]
Rules = Annotated[str, typer.Option("--rules", help="How answers are found: strict, or kojima as in the paper.")]
PassageTokens = Annotated[
    int | None,
    typer.Option("--passage-tokens", help="Budget of all passages in a prompt.", show_default="half the context"),
]
IgnoreChatTemplate = Annotated[
    bool, typer.Option("--ignore-chat-template", help="Plain text (Q: and A:) whatever the model has.")
]


def manner_of(
    rules: str, max_tokens: int | None, seed: int, passage_tokens: int | None, answer_trigger: str | None
) -> Manner:
    """What the options of these names ask for.

    Raises:
        InputError: a value out of range.
    """
    from quantlab.errors import InputError
    from quantlab.generation.answers import checked_rules
    from quantlab.generation.asking import Manner
    from quantlab.generation.kojima import REASONING_TOKENS

    for option, count in (("--max-tokens", max_tokens), ("--passage-tokens", passage_tokens)):
        if count is not None and count < 1:
            raise InputError(f"{option} {count}: at least 1 is needed")
    return Manner(
        reasoning_tokens=REASONING_TOKENS if max_tokens is None else max_tokens,
        seed=seed,
        rules=checked_rules(rules),
        passage_tokens=passage_tokens,
        answer_trigger=answer_trigger,
    )


def is_given(context: typer.Context, name: str) -> bool:
    """Whether the command line or the --config file sets a parameter."""
    source = context.get_parameter_source(name)
    return source is not None and source.name in ("COMMANDLINE", "DEFAULT_MAP")


def refuse_without_template(context: typer.Context, others: tuple[str, ...] = ()) -> None:
    """Refuse options of templates, and `others`, where no template is asked for.

    Raises:
        InputError: which one was given.
    """
    from quantlab.errors import InputError

    for name in (*OF_TEMPLATES, *others):
        if is_given(context, name):
            raise InputError(f"--{name.replace('_', '-')}: means nothing without a --template")
