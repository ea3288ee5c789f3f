"""Read one tensor of a model by rows: bytes from the file, then fp32 weights of them.

The two steps are apart so that one thread can read ahead while another computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from quantlab import native
from quantlab.adapters.adapter import LowRankPair
from quantlab.adapters.fusing import Fusion, block_factors, fused_blocks
from quantlab.checkpoint.checkpoint import Checkpoint
from quantlab.checkpoint.tensors import FLOAT_DTYPES, torch_dtype
from quantlab.errors import InputError
from quantlab.formats import BlockFormat
from quantlab.native import adapters as native_adapters

if TYPE_CHECKING:
    import torch


class Reader(Protocol):
    """Reads rows of something that is as large as a planned tensor.

    Attributes:
        row_bytes: that `fetch` needs for a row.
    """

    row_bytes: int

    def fetch(self, first: int, last: int, out: np.ndarray) -> None:
        """Fill `out` (uint8 [rows * row_bytes]) with what `decode` wants for rows `first` to `last`, not included."""

    def decode(self, raw: np.ndarray, first: int, last: int, out: torch.Tensor) -> None:
        """Write the weights of these rows to `out`, fp32 [rows, columns], contiguous (of a vector: [rows])."""


class RowReader:
    """Reads one tensor of a source by rows; a vector's rows are its elements.

    `fetch` reads bytes and may run in another thread than `decode`, which makes weights of them.

    Attributes:
        rows: of the tensor.
        row_bytes: as stored (of a tensor that is not divisible: as it is held).
    """

    def __init__(self, checkpoint: Checkpoint, name: str, pair: LowRankPair | None, fusion: Fusion | None) -> None:
        self.checkpoint, self.name = checkpoint, name
        self._entry, self._format, self._pair = checkpoint.entry(name), checkpoint.format(name), pair
        self._fusion = fusion if self._format is not None else None
        self._columns = checkpoint.shape(name)[1:]
        self.rows = self._entry.shape[0] if self._entry.shape else 1
        self.row_bytes = self._entry.nbytes // self.rows if self.rows else 0
        self._read = checkpoint.part_reader(name) or _Held(checkpoint.read_bytes(name))

    def fetch(self, first: int, last: int, out: np.ndarray) -> None:
        """Fill `out` (uint8 [rows * row_bytes]) with the bytes of rows `first` to `last`, not included."""
        if out.nbytes:
            self._read(first * self.row_bytes, out)

    def decode(self, raw: np.ndarray, first: int, last: int, out: torch.Tensor) -> None:
        """Write the weights that the bytes of these rows stand for to `out`, fp32 [rows, columns], contiguous."""
        if self._format is not None:
            self._dequantize(raw.reshape(last - first, -1), first, last, out.numpy())
        elif self._entry.dtype in FLOAT_DTYPES:
            out.copy_(_viewed(raw, self._entry.dtype).reshape(out.shape))
        else:
            raise InputError(
                f"{self.checkpoint.path}: {self.name}: holds {self._entry.dtype} numbers, which differ between the "
                "models and cannot be merged"
            )
        if self._pair is not None and self._fusion is None:
            _add_update(out.numpy(), self._pair, first, last)

    def _dequantize(self, blocks: np.ndarray, first: int, last: int, out: np.ndarray) -> None:
        format = self._format
        assert format is not None
        if self._pair is not None and self._fusion is not None:
            blocks = self._fused(format, blocks, self._pair, self._fusion, first, last)
        native.dequantize(format.name, blocks, threads=1, out=out)

    def _fused(
        self, format: BlockFormat, blocks: np.ndarray, pair: LowRankPair, fusion: Fusion, first: int, last: int
    ) -> np.ndarray:
        """The blocks that fusing writes, where the adapter was trained with those."""
        a = block_factors(pair.a) if fusion.method == "block-sum" else pair.a
        b = np.ascontiguousarray(pair.b[first:last])
        try:
            return fused_blocks(format, np.ascontiguousarray(blocks), a, b, pair.scale, fusion, threads=1)
        except ValueError as error:
            raise InputError(f"{self.checkpoint.path}: {self.name}: {error}") from None


class _Held:
    """Reads parts of bytes that are in memory."""

    def __init__(self, data: np.ndarray) -> None:
        self._data = data

    def __call__(self, begin: int, out: np.ndarray) -> None:
        out[:] = self._data[begin : begin + out.nbytes]


def _viewed(raw: np.ndarray, dtype: str) -> torch.Tensor:
    """The elements of raw bytes, without a copy."""
    import torch

    return torch.from_numpy(raw).view(torch_dtype(dtype))


def _add_update(weights: np.ndarray, pair: LowRankPair, first: int, last: int) -> None:
    """Add rows of an adapter's update in place, as `adapters.fuse` does it."""
    rows = np.ascontiguousarray(pair.b[first:last])
    weights += native_adapters.low_rank_product(pair.a, rows, pair.scale, threads=1)
    if pair.magnitude is not None:
        lengths = np.sqrt(np.einsum("ij,ij->i", weights, weights, dtype=np.float64))
        weights *= (pair.magnitude[first:last] / lengths).astype(np.float32)[:, None]


class MatchedReader:
    """Rows of another tensor in an order of one's own, such as that of a united vocabulary.

    Args:
        reader: of the other tensor.
        rows: which of its rows each of ours is; -1 for one that it lacks, which comes as zeros.
    """

    def __init__(self, reader: RowReader, rows: Sequence[int]) -> None:
        self._reader, self._rows = reader, np.asarray(rows, np.int64)
        self.row_bytes = reader.row_bytes

    def fetch(self, first: int, last: int, out: np.ndarray) -> None:
        for start, theirs, count in self._runs(first, last):
            self._reader.fetch(theirs, theirs + count, self._part(out, start, count))

    def decode(self, raw: np.ndarray, first: int, last: int, out: torch.Tensor) -> None:
        out.zero_()
        for start, theirs, count in self._runs(first, last):
            part = self._part(raw, start, count)
            self._reader.decode(part, theirs, theirs + count, out[start : start + count])

    def _part(self, raw: np.ndarray, start: int, count: int) -> np.ndarray:
        return raw[start * self.row_bytes : (start + count) * self.row_bytes]

    def _runs(self, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """(place in the part, first row there, rows) of rows that follow one another in both."""
        rows = self._rows[first:last]
        breaks = np.flatnonzero(np.diff(rows) != 1) + 1
        for start, end in zip([0, *breaks.tolist()], [*breaks.tolist(), len(rows)], strict=True):
            if start < end and rows[start] >= 0:
                yield start, int(rows[start]), end - start


class ZeroReader:
    """A tensor of zeros that no file holds."""

    row_bytes = 0

    def fetch(self, first: int, last: int, out: np.ndarray) -> None:
        pass

    def decode(self, raw: np.ndarray, first: int, last: int, out: torch.Tensor) -> None:
        out.zero_()
