"""The second moments of what linear layers read, summed over batches in one order whatever computes them.

Each batch is one thread's work, whose matrix products run on that thread alone; the sums are added in the batches'
order. So the bits do not depend on the number of threads, which they would if BLAS split one product among them.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from quantlab.calibration.activations import ActivationFile
from quantlab.calibration.batches import Batch
from quantlab.calibration.streamed_model import StreamedModel
from quantlab.errors import InputError
from quantlab.formats.blocks import BLOCK_SIZE
from quantlab.quantization.statistics import InputStatistics

Item = TypeVar("Item")
Result = TypeVar("Result")

PANEL = 512  # columns of a second moment at a time
MOST_BYTES = 2_000_000_000  # of second moments that wait to be added, two for each thread

Sums = dict[str, torch.Tensor]  # by linear weight: [in / 32, 32, 32] or [in], float32, sums over tokens


@contextlib.contextmanager
def one_thread_each() -> Iterator[None]:
    """Torch's operations run on the thread that calls them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_order(function: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """Results in the items' order, computed by up to `threads` at a time; at most that many wait."""
    with one_thread_each():
        if threads == 1:
            yield from map(function, items)
            return
        with ThreadPoolExecutor(threads) as pool:
            pending: deque[Future[Result]] = deque()
            try:
                for item in items:
                    pending.append(pool.submit(function, item))
                    if len(pending) == threads:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            finally:
                for future in pending:
                    future.cancel()


def input_groups(model: StreamedModel, index: int, hidden: torch.Tensor) -> list[list[str]]:
    """Linear weights of a loaded block that read the same inputs (queries, keys and values; gate and up), in the order
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
        model.forward_block(index, hidden[:1], note)
    return [names for _, names in met]


def collect_one(
    model: StreamedModel, index: int, name: str, batches: Sequence[Batch], hidden: ActivationFile, threads: int
) -> InputStatistics:
    """The second moment of one linear weight's inputs, with the block's weights as they are now.

    Raises:
        InputError: an input is NaN or infinite.
    """

    def moment(number: int) -> torch.Tensor:
        inputs = model.inputs_of(name, index, hidden.read(number))
        return second_moment(inputs, batches[number])

    threads = _affordable(threads, model.checkpoint.shape(name)[1])
    total = _summed(in_order(moment, range(len(batches)), threads))
    return _statistics(name, total, batches)


def collect_all(
    model: StreamedModel,
    index: int,
    groups: Sequence[Sequence[str]],
    batches: Sequence[Batch],
    hidden: ActivationFile,
    outputs: ActivationFile,
    threads: int,
) -> dict[str, InputStatistics]:
    """The tiles of the second moments of all groups in one pass, by each group's first name; writes the block's
    outputs too.

    Raises:
        InputError: an input is NaN or infinite.
    """
    firsts = [group[0] for group in groups]

    def pass_through(number: int) -> Sums:
        sums: Sums = {}

        def note(name: str, inputs: torch.Tensor) -> None:
            if name in firsts:
                sums[name] = tiles(inputs, batches[number])

        outputs.write(number, model.forward_block(index, hidden.read(number), note))
        return sums

    totals: Sums = {}
    for sums in in_order(pass_through, range(len(batches)), threads):
        for name, part in sums.items():
            totals[name] = totals[name] + part if name in totals else part
    return {name: _statistics(name, totals[name], batches) for name in firsts}


def collect_head(
    model: StreamedModel, name: str, batches: Sequence[Batch], hidden: ActivationFile, threads: int, *, full: bool
) -> InputStatistics:
    """Of the head's inputs: the final norm's outputs; `name` is what errors call it, `full` tells whether more than the
    tiles is wanted.
    """
    measure = second_moment if full else tiles

    def moment(number: int) -> torch.Tensor:
        return measure(model.final_norm(hidden.read(number)), batches[number])

    threads = _affordable(threads, model.width)
    return _statistics(name, _summed(in_order(moment, range(len(batches)), threads)), batches)


def run_block(model: StreamedModel, index: int, hidden: ActivationFile, outputs: ActivationFile, threads: int) -> None:
    """Write the outputs of a loaded block."""

    def step(number: int) -> None:
        outputs.write(number, model.forward_block(index, hidden.read(number)))

    for _ in in_order(step, range(len(hidden)), threads):
        pass


@torch.inference_mode()
def second_moment(inputs: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The sum over counted tokens of x x^T, float32 [in, in], exactly symmetric."""
    rows = _counted(inputs, batch)
    columns = rows.shape[1]
    product = torch.empty(columns, columns)
    for start in range(0, columns, PANEL):  # what lies below the diagonal is what lies above it
        end = start + PANEL
        product[start:end, start:] = rows[:, start:end].T @ rows[:, start:]
        product[end:, start:end] = product[start:end, end:].T
        square = product[start:end, start:end]
        square.copy_((square + square.T) / 2)
    return product


@torch.inference_mode()
def tiles(inputs: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The sums over counted tokens of x x^T of each 32 columns, float32 [in / 32, 32, 32], exactly symmetric; the sum
    of squares [in] where columns are no multiple of 32.
    """
    rows = _counted(inputs, batch)
    if rows.shape[1] % BLOCK_SIZE:
        return rows.square().sum(dim=0, dtype=torch.float64).to(torch.float32)
    columns = rows.reshape(len(rows), -1, BLOCK_SIZE).permute(1, 2, 0)  # [blocks, 32, tokens]
    products = columns @ columns.transpose(1, 2)
    return (products + products.transpose(1, 2)) / 2


def _affordable(threads: int, columns: int) -> int:
    """As many threads as memory for their second moments allows, at least one."""
    return max(1, min(threads, MOST_BYTES // (2 * 4 * columns**2)))


def _counted(inputs: torch.Tensor, batch: Batch) -> torch.Tensor:
    return inputs[torch.from_numpy(batch.counted)].to(torch.float32)


def _summed(parts: Iterator[torch.Tensor]) -> torch.Tensor:
    total = next(parts).clone()
    for part in parts:
        total += part
    return total


def _statistics(name: str, total: torch.Tensor, batches: Sequence[Batch]) -> InputStatistics:
    tokens = sum(batch.tokens for batch in batches)
    mean = total / tokens
    if not bool(mean.isfinite().all()):
        raise InputError(
            f"{name}: its inputs are NaN or infinite on the calibration text; the model is damaged, or its activations "
            "overflow"
        )
    if mean.ndim == 3:
        return InputStatistics.of_tiles(tokens, mean)
    return InputStatistics(tokens, mean) if mean.ndim == 1 else InputStatistics.of_second_moment(tokens, mean)
