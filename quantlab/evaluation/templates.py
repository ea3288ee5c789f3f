"""Prompt templates compared on one task: the same questions, the same rules for answers, paired tests."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from quantlab.adapters.combine import Source as AdapterSource
from quantlab.checkpoint import load_tokenizer
from quantlab.checkpoint.atomic import atomic_file, check_destination
from quantlab.errors import InputError
from quantlab.evaluation.asked_rows import AskedRow, RowAsking, Search, asked_rows
from quantlab.evaluation.evaluate import PLAIN, Accuracy, Progress, accuracy_of
from quantlab.evaluation.paired_tests import holm, mcnemar
from quantlab.evaluation.recall import Recall, measured_recall
from quantlab.evaluation.scorers import open_scorer
from quantlab.evaluation.tasks import read_task
from quantlab.generation.answers import checked_rules
from quantlab.generation.asking import Answered, Manner, ask, check_room
from quantlab.generation.examples import EXAMPLES, read_examples
from quantlab.generation.json_rows import MOST_FAULTS
from quantlab.generation.kojima import REASONING_TRIGGER
from quantlab.generation.prompt_format import prompt_format
from quantlab.generation.templates import Template, find_template
from quantlab.generation.writer import Writer


@dataclass(frozen=True)
class TemplateAccuracy(Accuracy):
    """A template's accuracy and its cost.

    Attributes:
        unanswered: the share of questions without an extracted answer; they count as wrong.
        prompt_tokens: a question's, on average; see `Answered`.
        generated_tokens: the same.
    """

    unanswered: float
    prompt_tokens: float
    generated_tokens: float


@dataclass(frozen=True)
class Pair:
    """Two templates: the questions that only one of them got right, McNemar's p, and Holm's where there are several."""

    a: str
    b: str
    only_a: int
    only_b: int
    p: float
    p_holm: float | None


@dataclass(frozen=True)
class TemplatesResult:
    """The first template's accuracy, all templates', and every two of them compared. `recall` tells what was found for
    the questions, where rows name their sources.
    """

    accuracy: float
    stderr: float
    interval: tuple[float, float]
    n: int
    per_template: dict[str, TemplateAccuracy]
    pairs: tuple[Pair, ...]
    recall: Recall | None
    rules: str
    chat_template: bool
    engine: str
    activations: str


def evaluate_templates(
    model: str | Path,
    task: Path,
    names: Sequence[str],
    *,
    manner: Manner | None = None,
    samples: int | None = None,
    temperature: float | None = None,
    triggers: Sequence[str] = (),
    examples: Path | None = None,
    shots: int = EXAMPLES,
    role: str = "",
    search: Search | None = None,
    ignore_chat_template: bool = False,
    limit: int | None = None,
    seed: int | None = None,
    engine: str = "auto",
    activations: str = "f32",
    threads: int | None = None,
    adapters: Sequence[AdapterSource] | None = None,
    save: Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> TemplatesResult:
    """Ask a model the questions of a task by each of several templates, in the file's order.

    Args:
        model: folder, GGUF file or hub id.
        task: JSON lines; see `tasks.read_task` and `asked_rows`.
        names: of templates; see `find_template`.
        manner: how questions are asked; by default greedily, within the paper's numbers of tokens.
        samples, temperature: of templates whose samples vote, in place of their own.
        triggers: what reasoning begins with, in place of the paper's; of several, each is a template of its own.
        examples: a file of worked examples. One that is the question itself is left out.
        shots: how many of them.
        role: for the role template; see `form_of`.
        search: passages for a question, in place of the rows' own.
        ignore_chat_template: ask in plain text.
        limit, seed, engine, activations, threads, adapters, progress: see `evaluate`. `seed`, or without it the
            manner's, also draws samples and the order of shuffled passages.
        save: where to write all prompts, texts and answers: a JSON line per question and template.
        overwrite: whether `save` may exist.

    Raises:
        InputError: the model, an adapter, the task or a template cannot be read, rows lack what a template needs, or a
            question does not fit the context.
    """
    if save is not None:
        check_destination(save, overwrite)
    manner = manner or Manner()
    manner = replace(manner, seed=manner.seed if seed is None else seed)
    checked_rules(manner.rules)
    templates = {
        name: _with_votes(template, samples, temperature) for name, template in named_templates(names, triggers).items()
    }
    _check_used(templates.values(), examples is not None, bool(role), search is not None)
    rows = asked_rows(task, read_task(task, limit, seed), manner.rules)
    shown = read_examples(examples, shots + 1 if shots > 0 else shots) if examples is not None else ()
    form = prompt_format(model, load_tokenizer(model), ignore_chat_template=ignore_chat_template)
    scorer = open_scorer(model, engine, None, threads, activations=activations, adapters=adapters)
    asking = RowAsking(rows, shown, shots, role, search, manner.seed)
    writer = Writer(scorer.engine, form)
    _check(task, rows, templates, asking, writer, manner, progress)
    found: dict[str, list[_Outcome]] = {name: [] for name in templates}
    for name, template in templates.items():  # one after another: the cache keeps what its questions begin with
        for number, row in enumerate(rows):
            answered = ask(writer, template, asking.asked(number, template), manner)
            found[name].append(_Outcome(row, answered, row.is_right(answered.answer)))
            if progress is not None:
                share = accuracy_of([outcome.right for outcome in found[name]]).accuracy
                done = sum(map(len, found.values()))
                progress(done, len(rows) * len(templates), f"{name} {100 * share:.1f} %")
    if save is not None:
        with atomic_file(save, overwrite) as path:
            path.write_text("".join(_saved(found)), encoding="utf-8")
    recall = measured_recall(asking, templates, {name: [each.right for each in found[name]] for name in found})
    return _result(found, recall, manner.rules, form.template is not None, scorer.name, activations)


def named_templates(names: Sequence[str], triggers: Sequence[str] = ()) -> dict[str, Template]:
    """Templates by the names that tables give them; those that begin a reasoning once with each trigger.

    Raises:
        InputError: no such template, one that is named twice, or triggers that none of them has a place for.
    """
    if twice := [name for name in names if list(names).count(name) > 1]:
        raise InputError(f"template {twice[0]}: is named twice")
    if PLAIN in names:
        raise InputError(f'template {PLAIN}: is judged by rules of its own; evaluate it alone, or take "zero-shot"')
    templates: dict[str, Template] = {}
    for name in names:
        template = find_template(name)
        begins = template.reasoning != "none" and not template.examples and template.trigger == REASONING_TRIGGER
        if not begins or not triggers:
            templates[name] = template
        for trigger in triggers if begins else ():
            shown = name if len(triggers) == 1 else f"{name}: {trigger}"
            templates[shown] = replace(template, trigger=trigger)
    if triggers and all(template.trigger not in triggers for template in templates.values()):
        raise InputError("--trigger: none of the templates begins a reasoning with it; add zero-shot-cot")
    return templates


def _check_used(templates: Collection[Template], has_examples: bool, has_role: bool, searches: bool) -> None:
    if has_examples and not any(template.wants_examples for template in templates):
        raise InputError("--examples: none of the templates shows worked examples; add few-shot")
    if has_role and not any(template.wants_role for template in templates):
        raise InputError("--role: none of the templates tells the model a role; add role")
    if searches and not any(template.wants_passages for template in templates):
        raise InputError("--index: none of the templates shows passages; add rag")


def _with_votes(template: Template, samples: int | None, temperature: float | None) -> Template:
    if template.samples == 1:
        return template
    return replace(
        template,
        samples=template.samples if samples is None else samples,
        temperature=template.temperature if temperature is None else temperature,
    )


@dataclass(frozen=True)
class _Outcome:
    """What came of a question by one template."""

    row: AskedRow
    answered: Answered
    right: bool


def _check(
    task: Path,
    rows: Sequence[AskedRow],
    templates: Mapping[str, Template],
    asking: RowAsking,
    writer: Writer,
    manner: Manner,
    progress: Progress | None,
) -> None:
    """Refuse before the first question what cannot be asked; passages are searched for here."""
    faults = []
    for number, row in enumerate(rows):
        for name, template in templates.items():
            try:
                check_room(writer, template, asking.asked(number, template), manner)
            except InputError as error:
                faults.append(f"line {row.line}, template {name}: {error}")
        if progress is not None:
            progress(0, len(rows) * len(templates), f"{number + 1} of {len(rows)} questions prepared")
    if faults:
        more = f"; and {len(faults) - MOST_FAULTS} more" if len(faults) > MOST_FAULTS else ""
        way_out = "show fewer examples or passages, or leave such rows out"
        raise InputError(f"{task}: {'; '.join(faults[:MOST_FAULTS])}{more} ({way_out})")


def _result(
    found: Mapping[str, Sequence[_Outcome]],
    recall: Recall | None,
    rules: str,
    has_chat_template: bool,
    engine: str,
    activations: str,
) -> TemplatesResult:
    per_template = {name: _accuracy(outcomes) for name, outcomes in found.items()}
    pairs = [_pair(a, b, found[a], found[b]) for a, b in combinations(found, 2)]
    if len(pairs) > 1:
        corrected = holm([pair.p for pair in pairs])
        pairs = [replace(pair, p_holm=value) for pair, value in zip(pairs, corrected, strict=True)]
    first = next(iter(per_template.values()))
    return TemplatesResult(
        first.accuracy,
        first.stderr,
        first.interval,
        first.n,
        per_template,
        tuple(pairs),
        recall,
        rules,
        has_chat_template,
        engine,
        activations,
    )


def _accuracy(outcomes: Sequence[_Outcome]) -> TemplateAccuracy:
    count = len(outcomes)
    return TemplateAccuracy(
        **vars(accuracy_of([outcome.right for outcome in outcomes])),
        unanswered=sum(not outcome.answered.answer for outcome in outcomes) / count,
        prompt_tokens=sum(outcome.answered.prompt_tokens for outcome in outcomes) / count,
        generated_tokens=sum(outcome.answered.generated_tokens for outcome in outcomes) / count,
    )


def _pair(a: str, b: str, one: Sequence[_Outcome], other: Sequence[_Outcome]) -> Pair:
    only_a = sum(x.right and not y.right for x, y in zip(one, other, strict=True))
    only_b = sum(y.right and not x.right for x, y in zip(one, other, strict=True))
    return Pair(a, b, only_a, only_b, mcnemar(only_a, only_b), None)


def _saved(found: Mapping[str, Sequence[_Outcome]]) -> Iterator[str]:
    """A JSON line per question and template, in the task's order."""
    for outcomes in zip(*found.values(), strict=True):
        for name, outcome in zip(found, outcomes, strict=True):
            yield json.dumps(_saved_row(name, outcome), ensure_ascii=False) + "\n"


def _saved_row(name: str, outcome: _Outcome) -> dict[str, Any]:
    row, answered = outcome.row, outcome.answered
    return {
        "line": row.line,
        "question": row.question,
        "template": name,
        "type": row.answer_type,
        "reference": row.reference,
        "answer": answered.answer,
        "right": outcome.right,
        "votes": answered.votes,
        "sources": list(answered.sources),
        "prompt_tokens": answered.prompt_tokens,
        "generated_tokens": answered.generated_tokens,
        "samples": [
            {
                "answer": sample.answer,
                "reasoning": sample.reasoning,
                "steps": [{"prompt": step.prompt, "text": step.completion.text} for step in sample.steps],
            }
            for sample in answered.samples
        ],
    }
