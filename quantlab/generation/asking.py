"""A question asked by a template: its steps, its samples, and the answer that they give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from quantlab.errors import InputError
from quantlab.generation.answers import Written, extracted_answer
from quantlab.generation.generator import Completion
from quantlab.generation.kojima import ANSWER_TOKENS, EXAMPLE_PHRASE, REASONING_TOKENS
from quantlab.generation.sampling import SamplingParams
from quantlab.generation.sources import within_budget
from quantlab.generation.templates import Asked, Form, Template, form_of
from quantlab.generation.votes import majority
from quantlab.generation.writer import Writer

FILLER = " ..."  # as in Lanham et al. 2023, arXiv 2307.13702
NEXT_QUESTION = "\nQ:"  # where a plain text goes on to another one


@dataclass(frozen=True)
class Manner:
    """How questions are asked, whatever the template.

    Attributes:
        reasoning_tokens: of a reasoning, or of an answer of any length, at most.
        answer_tokens: of an answer of a known type, at most.
        samples: in place of the template's number.
        params: for what the first step writes, in place of the template's temperature.
        seed: of samples, where `params` says nothing else; sample i has seed + i.
        rules: which answers are found; see `answers.RULES`.
        passage_tokens: the budget of all passages; by default half of the context.
        answer_trigger: see `form_of`.
        stop: strings that end what a step writes.
    """

    reasoning_tokens: int = REASONING_TOKENS
    answer_tokens: int = ANSWER_TOKENS
    samples: int | None = None
    params: SamplingParams | None = None
    seed: int = 0
    rules: str = "strict"
    passage_tokens: int | None = None
    answer_trigger: str | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Step:
    """A text, and what the model wrote behind it."""

    prompt: str
    completion: Completion


@dataclass(frozen=True)
class Sample:
    """One way through a template's steps. `reasoning` is empty where there is none, `answer` where none was found."""

    steps: tuple[Step, ...]
    reasoning: str
    answer: str


@dataclass(frozen=True)
class Answered:
    """What came of a question.

    Attributes:
        answer: the extracted answer, of several samples the majority's; empty if there is none.
        reasoning: of the first sample with that answer.
        votes: by answer, most first; None for a single sample.
        samples: all of them.
        chosen: the number of the first sample with that answer.
        sources: where the passages in the prompt come from, by number from 1.
        prompt_tokens: tokens that the model did not write, each counted once: the cache keeps what steps share.
        generated_tokens: tokens that the model wrote, in all samples.
    """

    answer: str
    reasoning: str
    votes: dict[str, int] | None
    samples: tuple[Sample, ...]
    chosen: int
    sources: tuple[str, ...]
    prompt_tokens: int
    generated_tokens: int


def ask(
    writer: Writer,
    template: Template,
    asked: Asked,
    manner: Manner | None = None,
    on_text: Callable[[str], None] | None = None,
) -> Answered:
    """Ask a question.

    Args:
        on_text: called with each piece of a single sample as it is certain, the template's own words included.

    Raises:
        InputError: the template lacks a piece, or the question leaves no room in the context.
    """
    manner = manner or Manner()
    asked = _fitted(writer, template, asked, manner)
    form = form_of(template, asked, manner.answer_trigger)
    text = writer.format.text(form.prompt)
    plan = _plan(writer, template, asked, form, text, manner)
    number = manner.samples or template.samples
    if number > 1 and asked.answer_type == "free":  # whole texts would hardly agree
        plan = replace(plan, asked=replace(asked, answer_type="text"))
    heard = on_text if number == 1 else None
    if heard and form.prompt.begun:
        heard(form.prompt.begun)
    params = _params(template, manner, number)
    begun = writer.write(text, plan.first_limit, params=params, samples=number, stop=plan.stops, on_text=heard)
    samples = tuple(_finished(writer, plan, first, heard) for first in begun)
    answer, votes = majority([sample.answer for sample in samples])
    chosen = next(index for index, sample in enumerate(samples) if sample.answer == answer or not answer)
    return Answered(
        answer,
        samples[chosen].reasoning,
        votes if number > 1 else None,
        samples,
        chosen,
        tuple(passage.source for passage in asked.passages) if template.wants_passages else (),
        writer.tokens(text) + sum(_added_tokens(writer, plan, sample) for sample in samples),
        sum(len(step.completion.token_ids) for sample in samples for step in sample.steps[plan.has_filler :]),
    )


def check_room(writer: Writer, template: Template, asked: Asked, manner: Manner) -> None:
    """Refuse what `ask` would refuse, without asking.

    Raises:
        InputError: the template lacks a piece, or the question leaves no room in the context.
    """
    asked = _fitted(writer, template, asked, manner)
    form = form_of(template, asked, manner.answer_trigger)
    text = writer.format.text(form.prompt)
    _params(template, manner, manner.samples or template.samples)
    _plan(writer, template, asked, form, text, manner)
    if (tokens := writer.tokens(text)) > writer.engine.context:
        raise InputError(f"the prompt has {tokens} tokens; the context holds {writer.engine.context}")


@dataclass(frozen=True)
class _Plan:
    """What a question's steps have in common. `has_filler`: the first step only says how long the filler is to be."""

    text: str
    form: Form
    asked: Asked
    rules: str
    shows_reasoning: bool
    has_filler: bool
    first_limit: int
    second_limit: int
    stops: tuple[str, ...]


def _plan(writer: Writer, template: Template, asked: Asked, form: Form, text: str, manner: Manner) -> _Plan:
    is_free = asked.answer_type == "free"
    is_short = not is_free and template.reasoning == "none" and template.layout is None
    limit = min(manner.reasoning_tokens, manner.answer_tokens) if is_short else manner.reasoning_tokens
    # In plain text a model that has answered may go on to a question of its own. The paper lets it.
    is_plain = writer.format.template is None and not form.prompt.is_whole
    ends = (NEXT_QUESTION,) if is_plain and (template.examples or is_free) else ()
    return _Plan(
        text,
        form,
        asked,
        manner.rules,
        shows_reasoning=template.examples and template.reasoning == "written",
        has_filler=template.reasoning == "filler" and bool(form.then),
        first_limit=min(limit, _room(writer, text, form.then, manner)) if form.then else limit,
        second_limit=manner.answer_tokens,
        stops=(*manner.stop, *ends),
    )


def _room(writer: Writer, text: str, then: str, manner: Manner) -> int:
    """Tokens that a reasoning may have, so that an answer fits in behind it."""
    taken = writer.tokens(f"{text} {then}") + manner.answer_tokens
    room = writer.engine.context - taken
    if room < 1:
        raise InputError(
            f"the question takes {taken} tokens with its template and room for an answer, which leaves none to reason "
            f"in a context of {writer.engine.context}"
        )
    return room


def _fitted(writer: Writer, template: Template, asked: Asked, manner: Manner) -> Asked:
    """With as many passages as the budget holds."""
    if not template.wants_passages:
        return asked
    budget = writer.engine.context // 2 if manner.passage_tokens is None else manner.passage_tokens
    tokenizer = writer.format.tokenizer
    kept = within_budget(asked.passages, budget, lambda text: len(tokenizer.encode(text, add_special_tokens=False)))
    return replace(asked, passages=kept)


def _params(template: Template, manner: Manner, samples: int) -> SamplingParams:
    params = manner.params or SamplingParams(
        temperature=template.temperature, top_k=40, top_p=1.0, min_p=0.0, seed=manner.seed
    )
    if samples > 1 and params.temperature == 0:
        raise InputError(f"{samples} samples at temperature 0 are all the same; ask for a temperature above 0")
    return params


def _finished(writer: Writer, plan: _Plan, first: Completion, on_text: Callable[[str], None] | None) -> Sample:
    """The answer of what the first step wrote: in it, or in a second step that goes on with its text."""
    steps = (Step(plan.text, first),)
    form, answer_type, choices = plan.form, plan.asked.answer_type, plan.asked.choices
    if not form.then:
        reasoning = first.text.rpartition(EXAMPLE_PHRASE)[0].strip() if plan.shows_reasoning else ""
        written = Written(first.text, form.trigger)
        return Sample(steps, reasoning, extracted_answer(written, answer_type, choices, plan.rules))
    thought = _fitting(writer, plan, _filler(writer, first) if plan.has_filler else first.text)
    if on_text:
        on_text(f" {form.then}")
    then = f"{plan.text}{thought} {form.then}"
    second = writer.write(then, plan.second_limit, stop=plan.stops, on_text=on_text)[0]
    answer = extracted_answer(Written(second.text, form.then.strip()), answer_type, choices, plan.rules)
    return Sample((*steps, Step(then, second)), f"{form.prompt.begun}{thought}".strip(), answer)


def _fitting(writer: Writer, plan: _Plan, thought: str) -> str:
    """What was written in tokens of its own choice may have more of the tokenizer's: then its end is cut off."""
    room = writer.engine.context - plan.second_limit
    while thought and writer.tokens(f"{plan.text}{thought} {plan.form.then}") > room:
        thought = thought[: len(thought) * 9 // 10]
    return thought


def _filler(writer: Writer, thought: Completion) -> str:
    """A text that says nothing, of about as many tokens as what it stands for."""
    tokenizer = writer.format.tokenizer
    wanted = len(tokenizer.encode(thought.text, add_special_tokens=False))
    hundred = len(tokenizer.encode(FILLER * 100, add_special_tokens=False))
    return FILLER * round(100 * wanted / hundred)


def _added_tokens(writer: Writer, plan: _Plan, sample: Sample) -> int:
    """Tokens of the second prompt that neither the first has nor the model wrote."""
    if len(sample.steps) == 1:
        return 0
    first, second = sample.steps
    before = first.prompt if plan.has_filler else first.prompt + first.completion.text
    return max(0, writer.tokens(second.prompt) - writer.tokens(before))
