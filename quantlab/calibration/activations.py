"""Activations between two blocks, by batch in a file: memory holds those at work, the page cache as many as fit."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from quantlab.calibration.batches import Batch
from quantlab.checkpoint.positioned import read_exactly, write_all
from quantlab.checkpoint.tensors import raw_bytes


class ActivationFile:
    """Hidden states [windows, length, width] of every batch; reading and writing may happen in any order and thread.

    A context manager; the file stays.
    """

    def __init__(self, path: Path, batches: Sequence[Batch], width: int, dtype: torch.dtype, *, create: bool) -> None:
        self.path, self._width, self._dtype = path, width, dtype
        self._shapes = [(*batch.shape, width) for batch in batches]
        sizes = [int(np.prod(shape)) * dtype.itemsize for shape in self._shapes]
        self._offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(int).tolist()
        flags = os.O_RDWR | (os.O_CREAT | os.O_TRUNC if create else 0)
        self._descriptor = os.open(path, flags, 0o644)

    def __enter__(self) -> ActivationFile:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def __len__(self) -> int:
        return len(self._shapes)

    @property
    def nbytes(self) -> int:
        """Of the whole file."""
        return int(self._offsets[-1])

    def write(self, index: int, hidden: torch.Tensor) -> None:
        """Store a batch's hidden states."""
        assert tuple(hidden.shape) == self._shapes[index]
        write_all(self._descriptor, raw_bytes(hidden.to(self._dtype)).data, self._offsets[index])

    def read(self, index: int) -> torch.Tensor:
        """A batch's hidden states."""
        size = self._offsets[index + 1] - self._offsets[index]
        data = read_exactly(self._descriptor, size, self._offsets[index], self.path, "the activations")
        return torch.from_numpy(data).view(self._dtype).reshape(self._shapes[index])

    def sync(self) -> None:
        """Wait until it is on the disk."""
        os.fsync(self._descriptor)
