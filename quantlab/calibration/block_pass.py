"""All batches' way through one block, from one group of linear layers to the next, each computed once.

Passes wait inside the block while a group is quantized (`paused_forward`), as many as memory allows; the others begin
anew for every group, which costs time and changes no bit.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from quantlab.calibration import collection, heap
from quantlab.calibration.activations import ActivationFile
from quantlab.calibration.batches import Batch
from quantlab.calibration.drift_sums import measured_behind, measured_beside
from quantlab.calibration.original_block import OriginalBlock
from quantlab.calibration.paused_forward import PausedForward
from quantlab.calibration.streamed_model import StreamedModel
from quantlab.quantization.statistics import InputStatistics
from quantlab.quantization.workers import in_order

T = TypeVar("T")

MOST_WAITING = 2_500_000_000  # bytes that waiting passes may hold
SHARE_OF_MEMORY = 4  # or that part of the machine's
WIDTHS = 4  # hidden states that a waiting pass holds, beside the inputs of a layer


class BlockPass:
    """A pass over block `index` of `model`, whose weights may be set while it goes on: those of a layer until its
    inputs' successors are asked for. A context manager.

    Args:
        hidden: the block's inputs.
        threads: how many batches are computed at a time; the bits do not depend on it.
    """

    def __init__(
        self,
        model: StreamedModel,
        index: int,
        batches: Sequence[Batch],
        hidden: ActivationFile,
        threads: int,
    ) -> None:
        self.model, self.index, self.batches, self.hidden, self.threads = model, index, batches, hidden, threads
        self._waiting: dict[int, PausedForward] = {}
        self._may_wait = self._affordable()
        heap.share_heaps()

    def __enter__(self) -> BlockPass:
        return self

    def __exit__(self, *_: object) -> None:
        for forward in self._waiting.values():
            forward.close()
        self._waiting.clear()

    def statistics(self, name: str, *, full: bool, original: OriginalBlock | None = None) -> InputStatistics:
        """Of one linear weight's inputs, further on than those asked for before; `full` tells whether more than the
        tiles of their second moment is wanted, `original` is the original model's way through the same block, from
        which this one drifts.

        Raises:
            InputError: an input is NaN or infinite.
        """
        columns = self.model.checkpoint.shape(name)[1]
        if not full or original is None:
            found = collection.measured(
                name, lambda number: self.inputs(number, name), self.batches, columns, self.threads, full=full
            )
        elif original.is_told_behind(name):
            found = measured_behind(
                name, lambda number: self.added(number, name), lambda number: original.read(number, name),
                original.weight(name), self.batches, self.threads,
            )  # fmt: skip
        else:
            found = measured_beside(
                name, lambda number: self.inputs(number, name), lambda number: original.read(number, name),
                self.batches, columns, self.threads,
            )  # fmt: skip
        if full:  # some hundred MB a matrix; less is sooner used again than given back and mapped anew
            heap.give_back()
        return found

    def finish(self, outputs: ActivationFile) -> None:
        """Write the block's outputs."""

        def step(number: int) -> None:
            forward = self._waiting.pop(number, None) or self._new(number)
            outputs.write(number, forward.until(None))

        for _ in in_order(step, range(len(self.batches)), self.threads):
            pass

    def inputs(self, number: int, name: str) -> torch.Tensor:
        """Of a linear weight further on than those asked for before, for a batch [windows, length, in]."""
        return self._reached(number, lambda forward: forward.until(name))

    def added(self, number: int, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The same of a writer, with what its outputs are added to [windows, length, width]."""

        def reach(forward: PausedForward) -> tuple[torch.Tensor, torch.Tensor]:
            inputs = forward.until(name)
            assert forward.residual is not None, f"{name}: no writer"
            return inputs, forward.residual

        return self._reached(number, reach)

    def _reached(self, number: int, reach: Callable[[PausedForward], T]) -> T:
        forward = self._waiting.get(number)
        if forward is not None:
            return reach(forward)
        forward = self._new(number)
        if number < self._may_wait:
            self._waiting[number] = forward
            return reach(forward)
        try:
            return reach(forward)
        finally:
            forward.close()

    def _new(self, number: int) -> PausedForward:
        return PausedForward(self.model, self.index, self.hidden.read(number))

    def _affordable(self) -> int:
        """How many of the batches may wait."""
        inputs = [self.model.checkpoint.shape(name)[1] for name in self.model.linear_names(self.index)]
        widest = max(inputs, default=0) + WIDTHS * self.model.width
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else MOST_WAITING
        left = min(MOST_WAITING, memory // SHARE_OF_MEMORY)
        for number, batch in enumerate(self.batches):
            left -= batch.ids.size * widest * self.model.dtype.itemsize
            if left < 0:
                return number
        return len(self.batches)
