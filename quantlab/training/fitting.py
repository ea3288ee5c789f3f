"""Samples that are longer than the context, and rows that are held out for evaluation."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from quantlab.errors import InputError
from quantlab.training.faults import counted, listed
from quantlab.training.sample import Sample

TOO_LONG = ("error", "cut", "skip")
Item = TypeVar("Item")


def fitted(samples: Sequence[Sample], context: int, too_long: str, notes: list[str]) -> list[Sample]:
    """The samples as they fit into the context, by one of TOO_LONG; what was cut or left out is added to `notes`.

    A sample that is cut keeps its first `context` tokens, so that its end token is lost and the model does not learn
    to stop there. One whose prompt alone fills the context is left out.

    Raises:
        InputError: some are longer and `too_long` is "error".
    """
    longer = [sample for sample in samples if len(sample.input_ids) > context]
    if not longer:
        return list(samples)
    lengths = listed([f"{sample.place} ({len(sample.input_ids)})" for sample in longer], ", ")
    if too_long == "error":
        raise InputError(
            f"{counted(len(longer), 'sample')} longer than the context of {context} tokens: {lengths}; give a longer "
            "context, or have them cut or skipped"
        )
    if too_long == "skip":
        notes.append(f"{counted(len(longer), 'sample')} longer than {context} tokens left out: {lengths}")
        return [sample for sample in samples if len(sample.input_ids) <= context]
    shorter = [_cut(sample, context) for sample in samples]
    empty = [sample.place for sample in shorter if not sample.trained]
    lost = sum(len(sample.input_ids) - context for sample in longer)
    notes.append(
        f"{counted(len(longer), 'sample')} cut to {context} tokens, {counted(lost, 'token')} lost, and with them each "
        f"one's end token: {lengths}"
    )
    if empty:
        notes.append(
            f"{counted(len(empty), 'sample')} left out, for the prompt fills the context: {listed(empty, ', ')}"
        )
    return [sample for sample in shorter if sample.trained]


def held_out(
    items: Sequence[Item], amount: float, seed: int, path: Path, *, last: bool
) -> tuple[list[Item], list[Item]]:
    """Part `items` into those to train on and those to evaluate on, both in their order.

    Args:
        amount: a share below 1, or a number.
        seed: draws them, the same in every version of Python.
        last: take the last ones instead: windows of one text, whose neighbours would give each other away.

    Raises:
        InputError: nothing would be left on one side.
    """
    count = round(amount * len(items)) if amount < 1 else int(amount)
    count = max(1, count)
    if count >= len(items):
        raise InputError(f"{path}: {counted(len(items), 'row')}; {count} held out would leave none to train on")
    order = list(range(len(items)))
    if not last:
        order.sort(key=lambda number: hashlib.sha256(f"{seed} {number}".encode()).digest())
    chosen = set(order[-count:])
    return [x for n, x in enumerate(items) if n not in chosen], [x for n, x in enumerate(items) if n in chosen]


def _cut(sample: Sample, context: int) -> Sample:
    if len(sample.input_ids) <= context:
        return sample
    return Sample(sample.input_ids[:context], sample.labels[:context], sample.place, sample.as_served)
