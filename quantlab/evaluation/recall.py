"""What a search found, apart from what a model made of it: recall of the rows' sources, and accuracy given a hit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quantlab.evaluation.asked_rows import RowAsking
from quantlab.evaluation.evaluate import Accuracy, accuracy_of
from quantlab.generation.templates import Template


@dataclass(frozen=True)
class Recall:
    """Of the questions whose rows name their sources.

    Attributes:
        passages: the most that were found for a question: the k of recall@k.
        found: the share of questions with one of their sources among their passages.
        accuracy_if_found: by template, of these questions alone; None if there are none. Controls are left out.
    """

    passages: int
    found: Accuracy
    accuracy_if_found: dict[str, Accuracy | None]


def measured_recall(
    asking: RowAsking, templates: Mapping[str, Template], right: Mapping[str, Sequence[bool]]
) -> Recall | None:
    """None where no template shows the passages of its own question, or no row names a source.

    Args:
        right: by template, which questions were answered rightly.
    """
    shown = [name for name, template in templates.items() if template.wants_passages and not template.is_control]
    named = [number for number, row in enumerate(asking.rows) if row.sources]
    if not shown or not named:
        return None
    found = {number: asking.is_found(number) for number in named}
    hits = [number for number in named if found[number]]
    return Recall(
        max(len(asking.own_passages(number)) for number in named),
        accuracy_of(list(found.values())),
        {name: accuracy_of([right[name][number] for number in hits]) if hits else None for name in shown},
    )
