"""How far a layer's inputs, and the hidden states that its outputs are added to, went from the original model's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from quantlab.calibration.batches import Batch
from quantlab.calibration.collection import PANEL, ROUND, MomentSum, check_finite, counted_rows, statistics_of
from quantlab.quantization.statistics import InputStatistics
from quantlab.quantization.workers import in_order


@dataclass(frozen=True)
class Met:
    """What a batch meets at a linear layer: its inputs [windows, length, in] and, where its outputs are added to hidden
    states, these [windows, length, width].
    """

    inputs: torch.Tensor
    residual: torch.Tensor | None = None

    def counted(self, batch: Batch) -> Met:
        """Rows of the tokens that count, float32 [tokens, ...]."""
        residual = None if self.residual is None else counted_rows(self.residual, batch)
        return Met(counted_rows(self.inputs, batch), residual)


Meeting = Callable[[int], Met]  # a batch's number -> what it meets


class CrossSum:
    """The sum of (y - x) z^T over rows x, y [tokens, rows] and z [tokens, columns], float32 [rows, columns].

    Panels of rows are the threads' work, so that bits do not depend on the number of threads.
    """

    def __init__(self, rows: int, columns: int) -> None:
        self._sum = torch.zeros(rows, columns)
        self._panels = [slice(start, min(start + PANEL, rows)) for start in range(0, rows, PANEL)]

    @torch.inference_mode()
    def add(self, parts: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], threads: int) -> None:
        """Add (x, y, z), float32."""

        @torch.inference_mode()
        def add_panel(panel: slice) -> None:
            for here, there, inputs in parts:
                self._sum[panel].addmm_((there[:, panel] - here[:, panel]).T, inputs)

        for _ in in_order(add_panel, self._panels, threads):
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
    name: str, here: Meeting, there: Meeting, batches: Sequence[Batch], shape: tuple[int, int], threads: int
) -> InputStatistics:
    """The second moment of what `here` meets, and its drift from what `there`, the original, meets at the same layer.

    Args:
        name: what errors call the layer.
        shape: of its weight, [out, in].

    Raises:
        InputError: an input is NaN or infinite.
    """
    rows, columns = shape
    total, drift = MomentSum(columns), CrossSum(columns, columns)
    apart: CrossSum | None = None
    for start in range(0, len(batches), ROUND * threads):
        some = range(start, min(start + ROUND * threads, len(batches)))
        ours = list(in_order(lambda number: here(number).counted(batches[number]), some, threads))
        theirs = list(in_order(lambda number: there(number).counted(batches[number]), some, threads))
        total.add([met.inputs for met in ours], threads)
        drift.add([(met.inputs, other.inputs, met.inputs) for met, other in zip(ours, theirs, strict=True)], threads)
        residuals = [
            (met.residual, other.residual, met.inputs)
            for met, other in zip(ours, theirs, strict=True)
            if met.residual is not None and other.residual is not None
        ]
        if residuals:
            apart = apart or CrossSum(rows, columns)
            apart.add(residuals, threads)
    found = statistics_of(name, total.symmetric(), batches)
    residual = None if apart is None else apart.mean(name, found.tokens)
    return replace(found, drift=drift.mean(name, found.tokens), residual_drift=residual)
