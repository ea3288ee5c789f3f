"""How far a layer's inputs, and what it makes of the hidden states, went from the original model's."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from quantlab.calibration.batches import Batch
from quantlab.calibration.collection import (
    BREADTH,
    PANEL,
    ROUND,
    MomentSum,
    check_finite,
    counted_rows,
    slices,
    statistics_of,
)
from quantlab.quantization.statistics import InputStatistics
from quantlab.quantization.workers import in_order

Rows = Callable[[int], torch.Tensor]  # a batch's number -> values of its tokens [windows, length, columns]
Added = Callable[[int], tuple[torch.Tensor, torch.Tensor]]  # -> a layer's inputs, and what its outputs are added to


class CrossSum:
    """The sum of (y - x) z^T over rows x, y [tokens, rows] and z [tokens, columns], float32 [rows, columns].

    Parts of it are the threads' work, so that bits do not depend on the number of threads.
    """

    def __init__(self, rows: int, columns: int) -> None:
        self._sum = torch.zeros(rows, columns)
        self._parts = list(itertools.product(slices(0, rows, PANEL), slices(0, columns, BREADTH)))

    @torch.inference_mode()
    def add(self, parts: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], threads: int) -> None:
        """Add (x, y, z), float32."""

        @torch.inference_mode()
        def add_part(where: tuple[slice, slice]) -> None:
            rows, columns = where
            for here, there, inputs in parts:
                self._sum[where].addmm_((there[:, rows] - here[:, rows]).T, inputs[:, columns])

        for _ in in_order(add_part, self._parts, threads):
            pass

    @torch.inference_mode()
    def less(self, weight: torch.Tensor, second_moments: torch.Tensor, threads: int) -> None:
        """Take off `weight` [rows, columns] times a sum of second moments [columns, columns]."""

        @torch.inference_mode()
        def take_off(where: tuple[slice, slice]) -> None:
            self._sum[where].addmm_(weight[where[0]], second_moments[:, where[1]], alpha=-1)

        for _ in in_order(take_off, self._parts, threads):
            pass

    def mean(self, name: str, tokens: int) -> torch.Tensor:
        """Over so many tokens.

        Raises:
            InputError: something is NaN or infinite; `name` is what it calls the layer.
        """
        found = self._sum / tokens
        check_finite(name, found)
        return found


def measured_beside(
    name: str, here: Rows, there: Rows, batches: Sequence[Batch], columns: int, threads: int
) -> InputStatistics:
    """The second moment of a layer's inputs `here`, and their drift from those of the same layer `there`, in the
    original.

    Args:
        name: what errors call the layer.

    Raises:
        InputError: an input is NaN or infinite.
    """
    total, drift = MomentSum(columns), CrossSum(columns, columns)
    for some in _rounds(batches, threads):
        ours = list(in_order(lambda number: counted_rows(here(number), batches[number]), some, threads))
        theirs = list(in_order(lambda number: counted_rows(there(number), batches[number]), some, threads))
        total.add(ours, threads)
        drift.add([(x, y, x) for x, y in zip(ours, theirs, strict=True)], threads)
    found = statistics_of(name, total.symmetric(), batches)
    return replace(found, drift=drift.mean(name, found.tokens))


def measured_behind(
    name: str, here: Added, there: Rows, weight: torch.Tensor, batches: Sequence[Batch], threads: int
) -> InputStatistics:
    """The second moment of the inputs of a layer whose outputs are added to hidden states, and how far these drift from
    what `there` gives, the original's hidden states behind the layer: for [out, in] fewer products than the drift of
    inputs [in, in] and that of what they are added to.

    Args:
        name: what errors call the layer.
        weight: the original's, float32 [out, in].

    Raises:
        InputError: an input is NaN or infinite.
    """
    rows, columns = weight.shape
    total, drift = MomentSum(columns), CrossSum(rows, columns)
    for some in _rounds(batches, threads):
        ours = list(in_order(lambda number: _counted(here(number), batches[number]), some, threads))
        theirs = list(in_order(lambda number: counted_rows(there(number), batches[number]), some, threads))
        total.add([inputs for inputs, _ in ours], threads)
        drift.add([(added_to, y, inputs) for (inputs, added_to), y in zip(ours, theirs, strict=True)], threads)
    moments = total.symmetric()
    drift.less(weight, moments, threads)
    found = statistics_of(name, moments, batches)
    return replace(found, output_drift=drift.mean(name, found.tokens))


def _rounds(batches: Sequence[Batch], threads: int) -> list[range]:
    size = ROUND * threads
    return [range(start, min(start + size, len(batches))) for start in range(0, len(batches), size)]


def _counted(values: tuple[torch.Tensor, torch.Tensor], batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    return counted_rows(values[0], batch), counted_rows(values[1], batch)
