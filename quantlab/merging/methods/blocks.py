"""Long tensors as short runs of elements, so that what a merge computes on the way stays in a core's cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

ELEMENTS = 1 << 16  # of one run: 256 KB in fp32, half a MB in float64


def runs(count: int, unit: int = 1) -> Iterator[tuple[int, int]]:
    """First and last element of runs of whole units (rows, say) that cover `count` elements, about ELEMENTS each."""
    step = max(1, ELEMENTS // max(1, unit)) * unit
    for first in range(0, count, max(1, step)):
        yield first, min(count, first + step)


def longest(bounds: Sequence[tuple[int, int]]) -> int:
    """How many elements the longest of these runs has."""
    return max((last - first for first, last in bounds), default=0)


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as a vector, without a copy where it is contiguous."""
    return tensor.reshape(-1)
