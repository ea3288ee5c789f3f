"""`quantlab evaluate MODEL --task FILE.jsonl`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from quantlab.cli.console import check_threads, print_json, print_table, progress
from quantlab.cli.options import Activations, Adapters, Config, Engine, Json, Model, Threads, weighted_adapters
from quantlab.cli.passage_search import METHOD, PASSAGES, IndexPlace, PassageCount, SearchMethod, passage_search
from quantlab.cli.template_options import (
    TEMPLATE_NAMES,
    AnswerTrigger,
    ExampleFile,
    IgnoreChatTemplate,
    PassageTokens,
    Role,
    Rules,
    Shots,
    manner_of,
    refuse_without_template,
)
from quantlab.cli.template_table import evaluate_by_templates

if TYPE_CHECKING:
    from quantlab.evaluation.evaluate import Accuracy


def evaluate(
    context: typer.Context,
    model: Model,
    task: Annotated[Path, typer.Option("--task", help="JSON lines: question, answer and maybe choices.")],
    limit: Annotated[int | None, typer.Option("--limit", help="Ask this many questions.", show_default="all")] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Draw them at random.", show_default="the first ones")
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens", "-n", help="Of a reasoned answer, at most.", show_default="256; with --template 128"
        ),
    ] = None,
    template: Annotated[
        list[str] | None,
        typer.Option("--template", metavar="NAME", help=f"Ask by a template; repeat to compare. {TEMPLATE_NAMES}"),
    ] = None,
    trigger: Annotated[
        list[str] | None,
        typer.Option("--trigger", help="What a reasoning begins with; repeat for a template of each."),
    ] = None,
    answer_trigger: AnswerTrigger = None,
    examples: ExampleFile = None,
    shots: Shots = 8,
    role: Role = "",
    samples: Annotated[int | None, typer.Option("--samples", help="Of templates that vote.", show_default="5")] = None,
    temp: Annotated[float | None, typer.Option("--temp", help="Of samples that vote.", show_default="0.7")] = None,
    rules: Rules = "strict",
    index: IndexPlace = None,
    passage_count: PassageCount = PASSAGES,
    search_method: SearchMethod = METHOD,
    passage_tokens: PassageTokens = None,
    ignore_chat_template: IgnoreChatTemplate = False,
    save: Annotated[
        Path | None, typer.Option("--save", help="Write prompts, texts and answers: JSON lines.", show_default=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what --save names.")] = False,
    activations: Activations = "f32",
    engine: Engine = "auto",
    adapter: Adapters = None,
    threads: Threads = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Measure how many questions of a task a model answers rightly."""
    check_threads(threads)
    adapters = weighted_adapters(adapter)
    common: dict[str, Any] = {  # what both ways take
        "limit": limit,
        "seed": seed,
        "engine": engine,
        "activations": activations,
        "threads": threads,
        "adapters": adapters,
    }
    if template and template != ["plain"]:
        manner = manner_of(rules, max_tokens, 0, passage_tokens, answer_trigger)
        common |= {"examples": examples, "shots": shots, "role": role, "save": save, "overwrite": overwrite}
        common |= {"triggers": trigger or (), "samples": samples, "temperature": temp}
        common |= {"ignore_chat_template": ignore_chat_template, "manner": manner}
        common |= {"search": passage_search(index, passage_count, search_method) if index is not None else None}
        evaluate_by_templates(model, task, template, json, common)
        return
    refuse_without_template(context, ("samples", "temp"))
    from quantlab.evaluation import evaluate as evaluation

    with progress("evaluating", "questions") as report:
        result = evaluation.evaluate(
            model,
            task,
            max_tokens=evaluation.MAX_TOKENS if max_tokens is None else max_tokens,
            progress=report,
            **common,
        )
    if json:
        print_json(result)
        return
    kinds = {
        "exact answers": result.exact,
        "choices, by likelihood": result.choices,
        "choices, by likelihood per byte": result.choices_normalized,
    }
    rows = [_row(name, found) for name, found in kinds.items() if found is not None]
    if result.exact is not None and result.choices is not None:
        rows.append(_row("all, choices by likelihood", result.per_template["plain"]))
    print_table((f"{task.name}, plain prompts", "accuracy", "95 % interval", "questions"), rows)


def _row(name: str, found: Accuracy) -> tuple[str, ...]:
    low, high = found.interval
    return name, f"{100 * found.accuracy:.1f} %", f"{100 * low:.1f} to {100 * high:.1f} %", str(found.n)
