"""Calibration windows of several lengths in one array, and which of them are held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from quantlab.errors import InputError

HELD_OUT_SHARE, MOST_HELD_OUT = 8, 64  # every eighth window, and no more than that many


@dataclass(frozen=True)
class PaddedWindows:
    """Token ids int64 [windows, longest], padded with zeros at the end, and how many of each count, int64 [windows].

    `training` and `held_out` are numbers of windows, ascending; each window is in one of them.
    """

    ids: np.ndarray
    lengths: np.ndarray
    training: np.ndarray
    held_out: np.ndarray

    def tokens(self, windows: np.ndarray) -> int:
        """In the windows of these numbers."""
        return int(self.lengths[windows].sum())

    def __len__(self) -> int:
        return len(self.ids)


def pad_windows(samples: Sequence[Sequence[int]], vocabulary: int, seed: int) -> PaddedWindows:
    """The held-out windows are drawn by `seed`.

    Raises:
        InputError: fewer than two windows, an empty one, or ids that are not below `vocabulary`.
    """
    if len(samples) < 2 or min(map(len, samples)) < 1:
        raise InputError(f"learning scales needs at least 2 calibration windows with tokens; {len(samples)} are given")
    lengths = np.array([len(sample) for sample in samples])
    ids = np.zeros((len(samples), int(lengths.max())), np.int64)
    for row, sample in zip(ids, samples, strict=True):
        row[: len(sample)] = sample
    if ids.min() < 0 or ids.max() >= vocabulary:
        raise InputError(f"the calibration windows hold token {ids.max()}, the model knows {vocabulary}")
    order = np.random.default_rng(seed).permutation(len(ids))
    held_out = min(MOST_HELD_OUT, max(1, len(ids) // HELD_OUT_SHARE))
    return PaddedWindows(ids, lengths, np.sort(order[held_out:]), np.sort(order[:held_out]))
