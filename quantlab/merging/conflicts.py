"""How far the models of a merge pull a tensor apart, measured on the parts that the merge reads anyway.

Everything is a sum over elements: inner products of the models' differences from the base, and counts of signs.
Elements are taken in the tensor's order and summed by chunks of a fixed size, chunk after chunk, in float64, so that
the result does not depend on how the tensor was cut into parts.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from quantlab.checkpoint.tensor_names import layer_and_kind

if TYPE_CHECKING:
    import torch

    from quantlab.merging.plan_types import TensorPlan

CHUNK = 4096  # elements that are summed together
AT_ONCE = 32  # chunks: what is in float64 at a time

Matrix = tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class TensorConflict:
    """One tensor of a merge.

    Attributes:
        models: the merged models, in the order of all that follows.
        cosine: of every two differences from the base; None where one is zero.
        opposite: of every two, the share of the elements that both change which they move in opposite directions; None
            where there is no such element.
        conflict: the share of the elements that any model changes which some models raise and others lower.
        norms: of the differences, over the norm of the base's weights (None where that is zero).
        norm_ratio: of the largest difference to the smallest that is not zero; None without a difference.
        requantization_error: of the written tensor, over the norm of the merged weights; None where it was not packed.
    """

    name: str
    layer: int | None
    kind: str
    models: tuple[str, ...]
    elements: int
    cosine: Matrix
    opposite: Matrix
    conflict: float | None
    norms: tuple[float | None, ...]
    norm_ratio: float | None
    requantization_error: float | None = None

    @property
    def mean_cosine(self) -> float | None:
        """Over all pairs of models."""
        return _mean(_pairs(self.cosine))

    @property
    def lowest_cosine(self) -> float | None:
        """Of all pairs of models."""
        return min(_pairs(self.cosine), default=None)


@dataclass(frozen=True)
class ConflictReport:
    """All tensors that were merged as differences from a base, in the order of the output."""

    tensors: tuple[TensorConflict, ...]

    def kinds(self) -> dict[str, list[TensorConflict]]:
        """Tensors by kind, in the order in which kinds first come."""
        found: dict[str, list[TensorConflict]] = {}
        for tensor in self.tensors:
            found.setdefault(tensor.kind, []).append(tensor)
        return found


class ConflictMeter:
    """Measures one tensor of which it is shown every part once, in ascending order."""

    def __init__(self, models: int) -> None:
        self._models, self.elements = models, 0
        self._products = np.zeros((models + 1, models + 1))  # of the differences and, at the end, the base
        self._opposite = np.zeros((models, models), np.int64)
        self._both = np.zeros((models, models), np.int64)
        self._touched = self._conflicting = 0
        self._waiting = np.empty((models + 1, 0), np.float32)

    def add(self, base: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
        """Take a part: fp32 of any shape, elements in row-major order; every tensor has the base's shape."""
        parts = np.stack([part.detach().reshape(-1).numpy() for part in (*tensors, base)])
        self.elements += parts.shape[1]
        if self._waiting.shape[1]:
            parts = np.concatenate([self._waiting, parts], axis=1)
        whole = parts.shape[1] // CHUNK * CHUNK
        for start in range(0, whole, AT_ONCE * CHUNK):
            self._sum(parts[:, start : min(start + AT_ONCE * CHUNK, whole)])
        self._waiting = parts[:, whole:].copy()

    def _sum(self, parts: np.ndarray) -> None:
        """Whole chunks, fp32 [models + 1, elements]."""
        values = parts.astype(np.float64)
        values[:-1] -= values[-1]
        chunks = np.ascontiguousarray(values.reshape(len(values), -1, CHUNK).swapaxes(0, 1))
        for products in chunks @ chunks.swapaxes(1, 2):
            self._products += products
        raised, lowered = values[:-1] > 0, values[:-1] < 0
        changed = raised | lowered
        for i in range(self._models):
            for j in range(i):
                against = (raised[i] & lowered[j]) | (lowered[i] & raised[j])
                self._opposite[i, j] += np.count_nonzero(against)
                self._both[i, j] += np.count_nonzero(changed[i] & changed[j])
        self._touched += int(np.count_nonzero(changed.any(axis=0)))
        self._conflicting += int(np.count_nonzero(raised.any(axis=0) & lowered.any(axis=0)))

    def result(self, name: str, models: Sequence[str], requantization_error: float | None = None) -> TensorConflict:
        """What was measured; nothing can be added afterwards."""
        if self._waiting.shape[1]:
            missing = CHUNK - self._waiting.shape[1]
            self._sum(np.pad(self._waiting, ((0, 0), (0, missing))))  # zeros differ by nothing
            self._waiting = self._waiting[:, :0]
        norms = np.sqrt(self._products.diagonal())
        layer, kind = layer_and_kind(name)
        changes = [float(norm) for norm in norms[:-1]]
        moved = [norm for norm in changes if norm]
        return TensorConflict(
            name=name,
            layer=layer,
            kind=kind,
            models=tuple(models),
            elements=self.elements,
            cosine=self._symmetric(lambda i, j: _cosine(self._products[i, j], changes[i] * changes[j])),
            opposite=self._symmetric(lambda i, j: _ratio(self._opposite[i, j], self._both[i, j]), itself=0.0),
            conflict=_ratio(self._conflicting, self._touched),
            norms=tuple(_ratio(norm, norms[-1]) for norm in changes),
            norm_ratio=max(moved) / min(moved) if moved else None,
            requantization_error=requantization_error,
        )

    def _symmetric(self, value: Callable[[int, int], float | None], itself: float = 1.0) -> Matrix:
        """A matrix of `value(i, j)` for i > j."""
        models = range(self._models)
        return tuple(tuple(itself if i == j else value(max(i, j), min(i, j)) for j in models) for i in models)


class ConflictMeters:
    """Measures the tensors of a merge as it shows their parts; several threads may show different tensors."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._meters: dict[str, ConflictMeter] = {}
        self._found: dict[str, TensorConflict] = {}

    def observe(self, plan: TensorPlan, base: torch.Tensor | None, tensors: Sequence[torch.Tensor]) -> None:
        """Take the next part of a tensor; without a base there is no difference to measure."""
        if base is None:
            return
        with self._lock:
            meter = self._meters.setdefault(plan.name, ConflictMeter(len(tensors)))
        meter.add(base, tensors)
        if meter.elements == math.prod(plan.shape):
            found = meter.result(plan.name, [str(part.model) for part in plan.parts])
            with self._lock:
                self._found[plan.name] = found
                del self._meters[plan.name]

    def report(self, names: Sequence[str], requantization_errors: Mapping[str, float] | None = None) -> ConflictReport:
        """The tensors that were shown completely, in the order of `names`."""
        errors = requantization_errors or {}
        return ConflictReport(
            tuple(
                replace(self._found[name], requantization_error=errors.get(name))
                for name in names
                if name in self._found
            )
        )


def _cosine(product: float, norms: float) -> float | None:
    return max(-1.0, min(1.0, float(product) / norms)) if norms else None


def _ratio(part: float, whole: float) -> float | None:
    return float(part) / float(whole) if whole else None


def _pairs(matrix: Matrix) -> list[float]:
    return [value for i, row in enumerate(matrix) for value in row[:i] if value is not None]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
