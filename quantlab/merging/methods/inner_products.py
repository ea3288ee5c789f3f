"""Inner products of several tensors, in float64, the same bits however the tensors are cut into parts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

Doubles = npt.NDArray[np.float64]

RUN = 1 << 12  # elements that are summed together, counted from the tensor's beginning
RUNS = 16  # that are worked on at a time


class GramSurvey:
    """The inner products of all pairs of tensors: `result()` is [models, models].

    They are those of fp32 differences from the base, where `from_base` and there is one. Runs of RUN elements are
    summed pairwise, their sums added in order; a run that a part leaves unfinished waits for the next part.
    """

    passes = 1

    def __init__(self, *, from_base: bool) -> None:
        self._from_base = from_base
        self._sums: list[list[float]] = []
        self._waiting: npt.NDArray[np.float32] = np.empty((0, RUN), np.float32)
        self._count = 0  # elements that wait

    def add(self, base: torch.Tensor | None, tensors: Sequence[torch.Tensor]) -> None:
        if not self._sums:
            self._sums = [[0.0] * len(tensors) for _ in tensors]
            self._waiting = np.empty((len(tensors), RUN), np.float32)
        vectors = [_vector(tensor) for tensor in tensors]
        origin = _vector(base) if self._from_base and base is not None else None
        for first, last in self._steps(len(vectors[0])):
            whole = (last - first) % RUN == 0 and self._count == 0
            values = (
                np.empty((len(vectors), last - first), np.float32)
                if whole
                else self._waiting[:, self._count : self._count + last - first]
            )
            for row, vector in zip(values, vectors, strict=True):
                if origin is None:
                    row[:] = vector[first:last]
                else:
                    np.subtract(vector[first:last], origin[first:last], out=row)
            if whole:
                self._add_runs(values, RUN)
                continue
            self._count += last - first
            if self._count == RUN:
                self._finish_run()

    def _steps(self, size: int) -> Iterator[tuple[int, int]]:
        """What completes a waiting run, then whole runs, then the rest."""
        first = min(size, RUN - self._count) if self._count else 0
        if first:
            yield 0, first
        whole = first + (size - first) // RUN * RUN
        for start in range(first, whole, RUN * RUNS):
            yield start, min(whole, start + RUN * RUNS)
        if whole < size:
            yield whole, size

    def end_pass(self) -> None:
        if self._count:
            self._finish_run()

    def result(self) -> Doubles:
        return np.array(self._sums, np.float64)

    def _finish_run(self) -> None:
        self._add_runs(self._waiting[:, : self._count], self._count)
        self._count = 0

    def _add_runs(self, values: npt.NDArray[np.float32], length: int) -> None:
        for (i, j), sums in pair_sums(values.reshape(len(values), -1, length)):
            for value in sums.tolist():
                self._sums[i][j] += value
            self._sums[j][i] = self._sums[i][j]


class ColumnGramSurvey:
    """The inner products of the tensors' columns: `result()` is [models, models, columns].

    Rows are added one by one in order. Parts are rows of a matrix; a vector is one row.
    """

    passes = 1

    def __init__(self, *, from_base: bool) -> None:
        self._from_base = from_base
        self._sums: Doubles = np.empty((0, 0, 0))

    def add(self, base: torch.Tensor | None, tensors: Sequence[torch.Tensor]) -> None:
        for _, values in _row_blocks(base if self._from_base else None, tensors):
            if not len(self._sums):
                self._sums = np.zeros((len(tensors), len(tensors), values.shape[2]))
            wide = values.astype(np.float64)
            for i in range(len(wide)):
                for j in range(i, len(wide)):
                    products = np.concatenate([self._sums[i, j][None], wide[i] * wide[j]])
                    self._sums[i, j] = self._sums[j, i] = np.cumsum(products, axis=0)[-1]

    def end_pass(self) -> None:
        pass

    def result(self) -> Doubles:
        return self._sums


class NoSurvey:
    """Stands where the data need not be seen: `result()` is None."""

    passes = 0

    def add(self, base: torch.Tensor | None, tensors: Sequence[torch.Tensor]) -> None:
        raise AssertionError("there is no pass")

    def end_pass(self) -> None:
        raise AssertionError("there is no pass")

    def result(self) -> None:
        return None


def row_grams(base: torch.Tensor | None, tensors: Sequence[torch.Tensor]) -> Doubles:
    """The inner products of the tensors' rows, or of their differences from `base`: [models, models, rows]."""
    sums = np.zeros((len(tensors), len(tensors), len(matrix_of(tensors[0]))))
    for first, values in _row_blocks(base, tensors):
        here = slice(first, first + values.shape[1])
        for (i, j), found in pair_sums(values):
            sums[i, j, here] = sums[j, i, here] = found
    return sums


def pair_sums(values: npt.NDArray[np.float32]) -> Iterator[tuple[tuple[int, int], Doubles]]:
    """Pairs of models (i, j), i <= j, and their rows' inner products [rows]; `values` are [models, rows, columns]."""
    wide = values.astype(np.float64)
    room = np.empty(wide.shape[1:])
    for i in range(len(wide)):
        for j in range(i, len(wide)):
            yield (i, j), np.add.reduce(np.multiply(wide[i], wide[j], out=room), axis=-1)


def _vector(tensor: torch.Tensor) -> npt.NDArray[np.float32]:
    return tensor.detach().contiguous().numpy().reshape(-1)


def matrix_of(tensor: torch.Tensor) -> npt.NDArray[np.float32]:
    """A tensor as [rows, columns], a vector as one row."""
    shape = (math.prod(tensor.shape[:-1]), tensor.shape[-1]) if tensor.ndim > 1 else (1, tensor.numel())
    return tensor.detach().contiguous().numpy().reshape(shape)


def _row_blocks(
    base: torch.Tensor | None, tensors: Sequence[torch.Tensor]
) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
    """A few rows at a time: the first one's number, and all models' [models, rows, columns], less `base`'s."""
    origin, matrices = None if base is None else matrix_of(base), [matrix_of(tensor) for tensor in tensors]
    rows, columns = matrices[0].shape
    step = max(1, RUN * RUNS // max(1, columns))
    for first in range(0, rows, step):
        values = np.stack([matrix[first : first + step] for matrix in matrices])
        yield first, values if origin is None else np.subtract(values, origin[first : first + step], out=values)
