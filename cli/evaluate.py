"""`quantlab evaluate MODEL --task FILE.jsonl`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from quantlab.cli.console import check_threads, print_json, print_table, progress
from quantlab.cli.options import Activations, Adapters, Config, Engine, Json, Model, Threads, weighted_adapters

if TYPE_CHECKING:
    from quantlab.evaluation.evaluate import Accuracy


def evaluate(
    model: Model,
    task: Annotated[Path, typer.Option("--task", help="JSON lines: question, answer and maybe choices.")],
    limit: Annotated[int | None, typer.Option("--limit", help="Ask this many questions.", show_default="all")] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Draw them at random.", show_default="the first ones")
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", help="Of a reasoned answer, at most.")] = 256,
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
    from quantlab.evaluation import evaluate as evaluation

    with progress("evaluating", "questions") as report:
        result = evaluation.evaluate(
            model,
            task,
            limit=limit,
            seed=seed,
            max_tokens=max_tokens,
            engine=engine,
            activations=activations,
            threads=threads,
            adapters=adapters,
            progress=report,
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
