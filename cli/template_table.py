"""How `quantlab evaluate --template` shows templates beside each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantlab.cli.console import print_json, print_table, progress

if TYPE_CHECKING:
    from quantlab.evaluation.evaluate import Accuracy
    from quantlab.evaluation.recall import Recall
    from quantlab.evaluation.templates import Pair, TemplateAccuracy, TemplatesResult


def evaluate_by_templates(
    model: str, task: Path, names: Sequence[str], json: bool, settings: Mapping[str, Any]
) -> None:
    """Ask a task's questions by templates, and print what came of it; `settings` as `evaluate_templates` takes them."""
    from quantlab.evaluation.templates import evaluate_templates

    with progress("evaluating", "questions") as report:
        result = evaluate_templates(model, task, names, progress=report, **settings)
    if json:
        print_json(result)
    else:
        _print(task.name, result)


def _print(task: str, result: TemplatesResult) -> None:
    under = "the model's chat template" if result.chat_template else "plain text"
    columns = ("template", "accuracy", "95 % interval", "no answer", "prompt tokens", "generated")
    title = f"{task}, {result.n} questions, {under}, {result.rules} rules"
    print_table(columns, [_row(name, found) for name, found in result.per_template.items()], title)
    if result.recall is not None:
        print()
        _print_recall(result.recall)
    if result.pairs:
        corrected = result.pairs[0].p_holm is not None
        columns = ("McNemar", "only the first", "only the second", "p", *(("p (Holm)",) if corrected else ()))
        print()
        print_table(columns, [_pair_row(pair) for pair in result.pairs])


def _print_recall(recall: Recall) -> None:
    """What was found, apart from what was made of it."""
    columns = ("passages", "share", "95 % interval", "questions")
    rows = [(f"source found among {recall.passages}", *_share(recall.found))]
    for name, accuracy in recall.accuracy_if_found.items():
        if accuracy is not None:
            rows.append((f"{name}: right where it was found", *_share(accuracy)))
    print_table(columns, rows)


def _share(found: Accuracy) -> tuple[str, str, str]:
    low, high = found.interval
    return f"{100 * found.accuracy:.1f} %", f"{100 * low:.1f} to {100 * high:.1f} %", str(found.n)


def _row(name: str, found: TemplateAccuracy) -> tuple[str, ...]:
    low, high = found.interval
    return (
        name,
        f"{100 * found.accuracy:.1f} %",
        f"{100 * low:.1f} to {100 * high:.1f} %",
        f"{100 * found.unanswered:.1f} %",
        f"{found.prompt_tokens:.1f}",
        f"{found.generated_tokens:.1f}",
    )


def _pair_row(pair: Pair) -> tuple[str, ...]:
    values = [pair.p] if pair.p_holm is None else [pair.p, pair.p_holm]
    shown = ("< 0.0001" if value < 0.0001 else f"{value:.4f}" for value in values)
    return f"{pair.a} / {pair.b}", str(pair.only_a), str(pair.only_b), *shown
