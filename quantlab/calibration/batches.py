"""Windows of different lengths -> batches of one length each, in an order that depends on nothing but the windows.

Padding goes to the right, where no causal model looks; what stands there is left out of all statistics.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

BATCH_TOKENS = 1024  # padding included: bounds what a thread holds of a block's activations
SHRINK = 4  # a batch is as long as the longest window, or a half, quarter ... of that, so often


@dataclass(frozen=True)
class Batch:
    """Token ids [windows, length], of which the first `lengths` of each row count."""

    ids: np.ndarray
    lengths: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Windows and length."""
        return self.ids.shape[0], self.ids.shape[1]

    @property
    def tokens(self) -> int:
        """Tokens that count."""
        return sum(self.lengths)

    @property
    def counted(self) -> np.ndarray:
        """Which places count, bool [windows, length]."""
        return np.arange(self.ids.shape[1]) < np.asarray(self.lengths)[:, None]


def batches_of(windows: Sequence[Sequence[int]], length: int) -> list[Batch]:
    """Batches of at most 1024 places (or one window), longest first, windows in their order."""
    sizes = [-(-length // 2**step) for step in range(SHRINK)]
    groups: dict[int, list[Sequence[int]]] = {size: [] for size in sizes}
    for window in windows:
        groups[min(size for size in sizes if size >= len(window))].append(window)
    return [batch for size, group in groups.items() for batch in _padded(group, size)]


def _padded(windows: list[Sequence[int]], size: int) -> Iterator[Batch]:
    step = max(1, BATCH_TOKENS // size)
    for start in range(0, len(windows), step):
        part = windows[start : start + step]
        ids = np.zeros((len(part), size), np.int64)
        for row, window in zip(ids, part, strict=True):
            row[: len(window)] = window
            row[len(window) :] = window[0]
        yield Batch(ids, tuple(map(len, part)))
