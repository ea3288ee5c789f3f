"""How `quantlab generate --template` asks a question, and shows reasoning, votes, sources and answer."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from quantlab.cli.console import print_json
from quantlab.cli.template_options import is_given, manner_of

if TYPE_CHECKING:
    from quantlab.generation.examples import Example
    from quantlab.generation.sampling import SamplingParams
    from quantlab.generation.sources import Source
    from quantlab.generation.template_answer import TemplateCompletion
    from quantlab.generation.templates import Template

SAMPLING = (
    "temp", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "penalty_window",
    "logit_bias",
)  # fmt: skip


def answer_by_template(
    context: typer.Context, question: str, params: SamplingParams, settings: Mapping[str, Any]
) -> None:
    """Ask a question as the options of a command say, and print what came of it.

    Args:
        params: what sampling options make; they count where one is given.
        settings: engine, threads and adapters, as `answer_question` takes them.
    """
    from dataclasses import replace

    from quantlab.generation.answer_types import checked_answer_type
    from quantlab.generation.template_answer import answer_question, template_to_answer
    from quantlab.generation.templates import Asked

    options = context.params
    template = template_to_answer(options["template"], role=options["role"], trigger=options["trigger"])
    manner = manner_of(
        options["rules"],
        options["max_tokens"],
        options["seed"],
        options["passage_tokens"],
        options["answer_trigger"],
    )
    asked = Asked(
        question,
        checked_answer_type(options["answer_type"]),
        passages=_passages(template, question, options),
        examples=_examples(options["template"], template, options["examples"], options["shots"]),
        role=options["role"],
    )
    result = answer_question(
        options["model"],
        asked,
        template,
        manner=replace(
            manner,
            params=_params(context, template, params),
            samples=options["samples"] if is_given(context, "samples") else None,
            stop=tuple(options["stop"] or ()),
        ),
        ignore_chat_template=options["ignore_chat_template"],
        on_text=None if options["json"] else _show,
        **settings,
    )
    if options["json"]:
        print_json(result)
    else:
        _print(result, is_free=asked.answer_type == "free")


def _params(context: typer.Context, template: Template, params: SamplingParams) -> SamplingParams | None:
    """How a template's first step is drawn: as options ask, at its own temperature unless they name one; None where no
    option says anything.
    """
    from dataclasses import replace

    if not any(is_given(context, name) for name in SAMPLING):
        return None
    return params if is_given(context, "temp") else replace(params, temperature=template.temperature)


def _examples(name: str, template: Template, file: Path | None, shots: int) -> tuple[Example, ...]:
    """The worked examples that a template shows.

    Raises:
        InputError: it shows none.
    """
    from quantlab.errors import InputError
    from quantlab.generation.examples import read_examples

    if file is None:
        return ()
    if not template.wants_examples:
        raise InputError(f"--examples: template {name} shows none; add +few-shot")
    return read_examples(file, shots)


def _passages(template: Template, question: str, options: Mapping[str, Any]) -> Sequence[Source]:
    """The passages that a template shows: those of files, or those that are found for the question.

    Raises:
        InputError: it shows some and none were given, or the other way round; or the search fails.
    """
    from quantlab.errors import InputError
    from quantlab.generation.passage_files import read_passages

    name, files, index = options["template"], options["passages"] or (), options["index"]
    if (files or index) and not template.wants_passages:
        raise InputError(f"{'--passages' if files else '--index'}: template {name} shows none; add +rag")
    if files and index:
        raise InputError("--index: passages come from files or from an index; leave out --passages")
    if not (files or index) and template.passages != "none":
        raise InputError(f"template {name}: shows passages; give an index with --index, or files with --passages")
    if index:
        return _found(question, index, options["passage_count"], options["search_method"])
    return read_passages(files)


def _found(question: str, index: str, k: int, method: str) -> Sequence[Source]:
    """With the place in the document, so that the answer's sources tell it."""
    from quantlab.cli.passage_search import passage_search

    from quantlab.generation.sources import GivenSource

    return [GivenSource(passage.cited, passage.text) for passage in passage_search(index, k, method)(question)]


def _print(result: TemplateCompletion, is_free: bool) -> None:
    if result.votes is not None:
        print(result.reasoning or result.text.strip())
    else:
        print()
    _print_outcome(result, is_shown=is_free and len(result.steps) == 1 and result.votes is None)
    timings = result.timings
    print(
        f"[{result.engine} engine: {timings.prompt_tokens} prompt tokens, {timings.cached_tokens} of them cached, "
        f"{timings.generated_tokens} generated at {timings.decode_tokens_per_second:.1f}/s]",
        file=sys.stderr,
    )


def _print_outcome(result: TemplateCompletion, is_shown: bool) -> None:
    """Sources, votes and answer; without an answer that is the whole text, which is there already."""
    lines = [f"[{number}] {source}" for number, source in enumerate(result.sources, 1)]
    if result.votes is not None:
        votes = ", ".join(f"{answer} x{count}" for answer, count in result.votes.items())
        lines.append(f"votes: {votes or 'none'}")
    if not is_shown:
        lines.append(f"answer: {result.answer or 'none was found'}")
    if lines:
        print("\n" + "\n".join(lines))


def _show(piece: str) -> None:
    print(piece, end="", flush=True)
