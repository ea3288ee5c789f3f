"""Prompt templates: which pieces surround a question, and in which steps it is answered.

A template is data. Its pieces (worked examples, a role, passages, reasoning, votes) are independent of each other, so
templates compose: `rag+cot` reasons over passages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Literal

from quantlab.errors import InputError
from quantlab.generation.answer_types import AnswerType
from quantlab.generation.examples import Example
from quantlab.generation.jinja_layout import JinjaLayout, read_layout
from quantlab.generation.kojima import (
    IRRELEVANT_TRIGGER,
    REASONING_TRIGGER,
    direct_trigger,
    extraction_trigger,
    question_with_choices,
    worked_answer,
)
from quantlab.generation.prompts import Prompt
from quantlab.generation.sources import Source, numbered_sources

Passages = Literal["none", "given", "shuffled", "another question's", "oracle"]
Reasoning = Literal["none", "written", "filler"]

EXPERT = "You are an expert in the subject of the question."
JINJA = ".jinja"


@dataclass(frozen=True, kw_only=True)
class Template:
    """How a question is asked.

    Attributes:
        examples: worked examples come first; with reasoning they show it, and no trigger is needed.
        role: the model is told who it is.
        passages: which passages precede the question. All but "given" are controls of an evaluation.
        reasoning: whether a chain of thought precedes the answer, or a filler of its length (a control).
        trigger: what a chain of thought begins with where no example shows one.
        samples: how many answers vote.
        temperature: at which reasoning is drawn; answers always are the most likely ones.
        layout: a user's own Jinja file, in place of examples, role, passages and reasoning.
    """

    examples: bool = False
    role: bool = False
    passages: Passages = "none"
    reasoning: Reasoning = "none"
    trigger: str = REASONING_TRIGGER
    samples: int = 1
    temperature: float = 0.0
    layout: JinjaLayout | None = None

    @property
    def is_control(self) -> bool:
        """Whether only an evaluation can fill it in."""
        return self.passages not in ("none", "given")

    @property
    def wants_passages(self) -> bool:
        """Whether it has a place for passages."""
        return self.passages != "none" or (self.layout is not None and "passages" in self.layout.variables)

    @property
    def wants_examples(self) -> bool:
        """Whether it has a place for worked examples."""
        return self.examples or (self.layout is not None and "examples" in self.layout.variables)

    @property
    def wants_role(self) -> bool:
        """Whether it has a place for a role."""
        return self.role or (self.layout is not None and "role" in self.layout.variables)


TEMPLATES: dict[str, Template] = {
    "zero-shot": Template(),
    "few-shot": Template(examples=True),
    "role": Template(role=True),
    "zero-shot-cot": Template(reasoning="written"),
    "few-shot-cot": Template(examples=True, reasoning="written"),
    "self-consistency": Template(reasoning="written", samples=5, temperature=0.7),
    "rag": Template(passages="given"),
    # To be composed: cot for short, and votes without reasoning.
    "cot": Template(reasoning="written"),
    "votes": Template(samples=5, temperature=0.7),
    # Controls.
    "closed-book": Template(),
    "oracle": Template(passages="oracle"),
    "rag-shuffled": Template(passages="shuffled"),
    "rag-other": Template(passages="another question's"),
    "irrelevant-trigger": Template(reasoning="written", trigger=IRRELEVANT_TRIGGER),
    "filler": Template(reasoning="filler"),
}


@dataclass(frozen=True)
class Asked:
    """A question, and what templates may put around it."""

    question: str
    answer_type: AnswerType = "free"
    choices: tuple[str, ...] = ()
    passages: Sequence[Source] = ()
    examples: tuple[Example, ...] = ()
    role: str = ""


@dataclass(frozen=True)
class Form:
    """A prompt, and what asks for the answer behind the reasoning (None: the first step's text holds it).

    `trigger` is what `prompt.begun` asks for the answer with; empty if it does not.
    """

    prompt: Prompt
    then: str | None = None
    trigger: str = field(default="")


def find_template(name: str) -> Template:
    """A template by its name, by names joined with +, or by a Jinja file.

    Raises:
        InputError: there is none of that name, pieces exclude each other, or the file is no template.
    """
    names = [name] if name in TEMPLATES or (name.endswith(JINJA) and Path(name).is_file()) else name.split("+")
    return reduce(lambda one, other: _composed(one, other, name), map(_single, names))


def _single(name: str) -> Template:
    if name.endswith(JINJA):
        return Template(layout=read_layout(Path(name)))
    if name not in TEMPLATES:
        raise InputError(
            f"template {name!r}: choose one of: {', '.join(TEMPLATES)}, join some with +, or give a file *.jinja"
        )
    return TEMPLATES[name]


def _composed(one: Template, other: Template, name: str) -> Template:
    """Every piece that either has."""
    empty = Template()
    pieces = {key: value for key, value in vars(other).items() if value != getattr(empty, key)}
    clashes = [key for key, value in pieces.items() if getattr(one, key) not in (getattr(empty, key), value)]
    if clashes:
        raise InputError(f"template {name}: its parts exclude each other: two kinds of {clashes[0]}")
    return replace(one, **pieces)


def form_of(template: Template, asked: Asked, answer_trigger: str | None = None) -> Form:
    """The prompt of a question.

    Args:
        answer_trigger: what asks for the answer, in place of the paper's words for its type; empty for nothing, where
            one step holds the answer.

    Raises:
        InputError: a piece is missing that the template needs, or a Jinja file fails on this question.
    """
    if not asked.question.strip():
        raise InputError("the question is empty")
    question = question_with_choices(asked.question.strip(), asked.choices)
    if template.layout is not None:
        return _laid_out(template.layout, template, asked, question)
    reasons = template.reasoning != "none"
    prompt = Prompt(
        question,
        system=(asked.role or EXPERT) if template.role else "",
        shown=_shown(asked, reasons) if template.examples else (),
        context=numbered_sources(asked.passages) if template.passages != "none" else "",
    )
    if template.examples:
        return Form(prompt)
    if reasons:
        then = extraction_trigger(asked.answer_type, len(asked.choices)) if answer_trigger is None else answer_trigger
        return Form(replace(prompt, begun=template.trigger), then)
    trigger = direct_trigger(asked.answer_type, len(asked.choices)) if asked.answer_type != "free" else ""
    trigger = trigger if answer_trigger is None else answer_trigger
    return Form(replace(prompt, begun=trigger), trigger=trigger)


def _shown(asked: Asked, reasons: bool) -> tuple[tuple[str, str], ...]:
    if not asked.examples:
        raise InputError("worked examples are missing; give a file of them with --examples")
    if reasons and (bare := [example for example in asked.examples if not example.reasoning]):
        raise InputError(f'the example "{bare[0].question[:40]}" shows no reasoning, which the template asks for')
    shown = []
    for example in asked.examples:
        is_plain = asked.answer_type == "free" and not reasons
        answer = example.answer if is_plain else worked_answer(example.answer, example.reasoning if reasons else "")
        shown.append((question_with_choices(example.question, example.choices), answer))
    return tuple(shown)


def _laid_out(layout: JinjaLayout, template: Template, asked: Asked, question: str) -> Form:
    if "examples" in layout.variables and not asked.examples:
        raise InputError(f"{layout.where}: shows examples; give a file of them with --examples")
    written = layout.written(
        question=question, passages=asked.passages, examples=asked.examples, role=asked.role, choices=asked.choices
    )
    prompt = Prompt(written.user, written.system, begun=written.answer, is_whole=written.is_whole)
    return Form(prompt, written.then)
