"""The second moments of what linear layers read, summed over batches in one order whatever computes them.

A batch, or a panel of a sum, is one thread's work, whose matrix products run on that thread alone; sums are added in
the batches' order. So the bits do not depend on the number of threads, which they would if BLAS split one product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch

from quantlab.calibration.activations import ActivationFile
from quantlab.calibration.batches import Batch
from quantlab.calibration.streamed_model import StreamedModel
from quantlab.errors import InputError
from quantlab.formats.blocks import BLOCK_SIZE
from quantlab.quantization.statistics import InputStatistics
from quantlab.quantization.workers import in_order, one_thread_each

PANEL, BREADTH = 512, 1024  # rows and columns of a sum of products at a time
ROUND = 2  # batches a thread whose inputs are there before they are added to a second moment


def input_groups(model: StreamedModel, index: int, hidden: torch.Tensor) -> list[list[str]]:
    """Linear weights of a block that read the same inputs (queries, keys and values; gate and up), in the order
    in which the block meets them.
    """
    met: list[tuple[torch.Tensor, list[str]]] = []

    def note(name: str, inputs: torch.Tensor) -> None:
        for tensor, names in met:
            if tensor is inputs:
                names.append(name)
                return
        met.append((inputs, [name]))

    with one_thread_each():
        model.follow_block(index, hidden[:1], note)
    return [names for _, names in met]


def measured(
    name: str,
    inputs: Callable[[int], torch.Tensor],
    batches: Sequence[Batch],
    columns: int,
    threads: int,
    *,
    full: bool,
) -> InputStatistics:
    """The statistics of what `inputs` gives for each batch's number, [windows, length, columns].

    Args:
        name: what errors call the layer.
        full: the whole second moment, or its tiles.

    Raises:
        InputError: an input is NaN or infinite.
    """
    numbers = range(len(batches))
    if full:
        total = MomentSum(columns)
        for start in range(0, len(batches), ROUND * threads):
            some = numbers[start : start + ROUND * threads]
            total.add(list(in_order(lambda n: counted_rows(inputs(n), batches[n]), some, threads)), threads)
        return statistics_of(name, total.symmetric(), batches)
    return statistics_of(name, _summed(in_order(lambda n: tiles(inputs(n), batches[n]), numbers, threads)), batches)


def collect_head(
    model: StreamedModel, name: str, batches: Sequence[Batch], hidden: ActivationFile, threads: int, *, full: bool
) -> InputStatistics:
    """Of the head's inputs: the final norm's outputs; `name` is what errors call it."""
    return measured(name, lambda n: model.final_norm(hidden.read(n)), batches, model.width, threads, full=full)


class MomentSum:
    """The sum of x x^T over rows x, float32 [columns, columns].

    Parts of it are the threads' work, and each adds the rows in their order: memory holds the sum once, and its bits do
    not depend on the number of threads.
    """

    def __init__(self, columns: int) -> None:
        self._sum = torch.zeros(columns, columns)
        self._panels = slices(0, columns, PANEL)
        self._parts = [(panel, part) for panel in self._panels for part in slices(panel.start, columns, BREADTH)]

    @torch.inference_mode()
    def add(self, parts: Sequence[torch.Tensor], threads: int) -> None:
        """Add rows, float32 [tokens, columns] each."""

        @torch.inference_mode()
        def add_part(where: tuple[slice, slice]) -> None:  # what lies below the diagonal is what lies above it
            for rows in parts:
                self._sum[where].addmm_(rows[:, where[0]].T, rows[:, where[1]])

        for _ in in_order(add_part, self._parts, threads):
            pass

    @torch.inference_mode()
    def symmetric(self) -> torch.Tensor:
        """The sum, exactly symmetric; nothing can be added any more."""
        for panel in self._panels:
            square = self._sum[panel, panel]
            square.copy_((square + square.T) / 2)
            self._sum[panel.stop :, panel] = self._sum[panel, panel.stop :].T
        return self._sum


def slices(start: int, stop: int, size: int) -> list[slice]:
    """Of `size` each, the last of what is left."""
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]


@torch.inference_mode()
def tiles(inputs: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The sums over counted tokens of x x^T of each 32 columns, float32 [in / 32, 32, 32], exactly symmetric; the sum
    of squares [in] where columns are no multiple of 32.
    """
    rows = counted_rows(inputs, batch)
    if rows.shape[1] % BLOCK_SIZE:
        return rows.square().sum(dim=0, dtype=torch.float64).to(torch.float32)
    columns = rows.reshape(len(rows), -1, BLOCK_SIZE).permute(1, 2, 0)  # [blocks, 32, tokens]
    products = columns @ columns.transpose(1, 2)
    return (products + products.transpose(1, 2)) / 2


@torch.inference_mode()
def counted_rows(inputs: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Rows of the tokens that count, float32 [tokens, in]."""
    if batch.tokens == batch.ids.size:
        return inputs.reshape(-1, inputs.shape[-1]).to(torch.float32)
    return inputs[torch.from_numpy(batch.counted)].to(torch.float32)


def _summed(parts: Iterator[torch.Tensor]) -> torch.Tensor:
    total = next(parts).clone()
    for part in parts:
        total += part
    return total


def statistics_of(name: str, total: torch.Tensor, batches: Sequence[Batch]) -> InputStatistics:
    """Of sums over all batches.

    Raises:
        InputError: they are NaN or infinite; `name` is what it calls the layer.
    """
    tokens = sum(batch.tokens for batch in batches)
    mean = total / tokens
    check_finite(name, mean)
    if mean.ndim == 3:
        return InputStatistics.of_tiles(tokens, mean)
    return InputStatistics(tokens, mean) if mean.ndim == 1 else InputStatistics.of_second_moment(tokens, mean)


def check_finite(name: str, mean: torch.Tensor) -> None:
    """Refuse means of inputs that are NaN or infinite.

    Raises:
        InputError: they are.
    """
    if not all(map(math.isfinite, mean.aminmax())):
        raise InputError(
            f"{name}: its inputs are NaN or infinite on the calibration text; the model is damaged, or its activations "
            "overflow"
        )
