"""One question answered by a template: what `quantlab generate --template` does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from quantlab.adapters.combine import Source as AdapterSource
from quantlab.checkpoint import load_tokenizer
from quantlab.errors import InputError
from quantlab.generation.asking import Answered, Manner, ask
from quantlab.generation.engines import open_engine
from quantlab.generation.generator import Completion, Timings
from quantlab.generation.prompt_cache import PromptCache
from quantlab.generation.prompt_format import prompt_format
from quantlab.generation.templates import Asked, Template, find_template
from quantlab.generation.writer import Writer


@dataclass(frozen=True)
class Exchange:
    """A step's prompt, and what the model wrote behind it."""

    prompt: str
    text: str


@dataclass(frozen=True)
class Vote:
    """One sample's way to its answer."""

    reasoning: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class TemplateCompletion(Completion):
    """`text` and `token_ids` are what the model wrote in all steps, without the template's words; `timings` are of
    all samples together. Where samples vote, the first one with the majority's answer is told.

    Attributes:
        answer: the extracted answer; empty if there is none.
        reasoning: what precedes it; empty where the template asks for none.
        votes: by answer, most first; None for a single sample.
        sources: where the passages in the prompt come from, by number from 1.
        steps: what the model was given and wrote.
        samples: of those that vote, each; else none.
    """

    answer: str
    reasoning: str
    votes: dict[str, int] | None
    sources: tuple[str, ...]
    steps: tuple[Exchange, ...]
    samples: tuple[Vote, ...]


def answer_question(
    model: str | Path,
    asked: Asked,
    template: Template,
    *,
    manner: Manner | None = None,
    ignore_chat_template: bool = False,
    on_text: Callable[[str], None] | None = None,
    engine: str = "auto",
    threads: int | None = None,
    adapters: Sequence[AdapterSource] | None = None,
    prompt_cache: PromptCache | None = None,
) -> TemplateCompletion:
    """Load `model` and ask it; see `ask`, and `generate` for the model's arguments.

    Raises:
        InputError: the model cannot be loaded, or what `ask` refuses.
    """
    form = prompt_format(model, load_tokenizer(model), ignore_chat_template=ignore_chat_template)
    opened = open_engine(model, engine, threads=threads, adapters=adapters, prompt_cache=prompt_cache)
    writer = Writer(opened, form)
    return _told(ask(writer, template, asked, manner, on_text))


def template_to_answer(name: str, *, role: str = "", trigger: str | None = None) -> Template:
    """A template by its name, with a role if one is given, and another trigger.

    Raises:
        InputError: there is none of that name, it is a control of evaluations, or begins no reasoning with a trigger.
    """
    template = find_template(name)
    if template.is_control:
        raise InputError(f"template {name}: is a control of quantlab evaluate; a question of its own has rag")
    if trigger is not None:
        if template.reasoning == "none" or template.examples:
            raise InputError(f"--trigger: template {name} begins no reasoning with it; add +cot")
        template = replace(template, trigger=trigger)
    return replace(template, role=template.role or bool(role))


def _told(answered: Answered) -> TemplateCompletion:
    steps = answered.samples[answered.chosen].steps
    completions = [step.completion for step in steps]
    written = {
        "text": "".join(completion.text for completion in completions),
        "token_ids": tuple(token for completion in completions for token in completion.token_ids),
        "timings": _together([step.completion.timings for sample in answered.samples for step in sample.steps]),
        "reasoning": answered.reasoning,
    }
    return TemplateCompletion(
        **{**vars(completions[-1]), **written},
        answer=answered.answer,
        votes=answered.votes,
        sources=answered.sources,
        steps=tuple(Exchange(step.prompt, step.completion.text) for step in steps),
        samples=tuple(
            Vote(sample.reasoning, sample.answer) for sample in answered.samples if answered.votes is not None
        ),
    )


def _together(timings: Sequence[Timings]) -> Timings:
    """Counts added; speeds of all their tokens in all their time."""
    counts = {
        field.name: sum(getattr(one, field.name) for one in timings) for field in fields(Timings) if field.type == "int"
    }
    return replace(
        timings[0],
        **counts,
        prefill_tokens_per_second=_speed(
            [(one.prompt_tokens - one.cached_tokens, one.prefill_tokens_per_second) for one in timings]
        ),
        decode_tokens_per_second=_speed([(one.generated_tokens, one.decode_tokens_per_second) for one in timings]),
    )


def _speed(parts: Sequence[tuple[int, float]]) -> float:
    """Of parts of so many tokens at such speeds."""
    seconds = sum(tokens / speed for tokens, speed in parts if speed)
    return sum(tokens for tokens, _ in parts) / seconds if seconds else 0.0
