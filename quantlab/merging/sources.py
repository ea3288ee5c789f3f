"""The models that go into a merge: whatever their files, tensors come as fp32 rows, read where they lie.

A packed tensor's rows are dequantized, and an adapter's update is added to them. Rows come by `pread` into buffers that
the caller keeps, so that memory holds no more of a model than the parts at hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quantlab.adapters.adapter import Adapter, check_fits
from quantlab.adapters.fusing import Fusion, fusion_for
from quantlab.checkpoint.checkpoint import Checkpoint
from quantlab.checkpoint.families import Family
from quantlab.checkpoint.reader import open_checkpoint
from quantlab.checkpoint.tensors import FLOAT_DTYPES
from quantlab.errors import InputError
from quantlab.merging.readers import RowReader
from quantlab.merging.references import ModelReference

if TYPE_CHECKING:
    import torch

COMPARED_BYTES = 1 << 20  # at a time, of two tensors that may be equal


class MergeSource:
    """A model that is merged: a checkpoint, float or packed, and maybe an adapter on it.

    Attributes:
        checkpoint: the model's files, without the adapter.
        adapter: what is added to its weights.
    """

    def __init__(self, checkpoint: Checkpoint, adapter: Adapter | None = None) -> None:
        self.checkpoint, self.adapter = checkpoint, adapter
        self._fusion: Fusion | None = None
        if adapter is not None:
            check_fits(adapter, checkpoint)
            self._fusion = fusion_for([(adapter, 1.0)])
            for name in adapter.pairs:
                self._check_fusion(name)

    @property
    def names(self) -> tuple[str, ...]:
        """All tensors under full Hugging Face names; a tied head is not among them."""
        return self.checkpoint.names

    @property
    def config(self) -> dict[str, Any]:
        """config.json."""
        return self.checkpoint.config

    @property
    def family(self) -> Family:
        """The model family's row."""
        return self.checkpoint.family

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return self.checkpoint.tied

    @property
    def adapter_bytes(self) -> int:
        """What the adapter holds in memory."""
        return 0 if self.adapter is None else 4 * self.adapter.parameters

    def shape(self, name: str) -> tuple[int, ...]:
        """The weights' shape, packed or not: [out, in] for linear ones."""
        return self.checkpoint.shape(name)

    def is_float(self, name: str) -> bool:
        """Whether the tensor holds weights, packed or plain, and not integers."""
        return self.checkpoint.format(name) is not None or self.checkpoint.entry(name).dtype in FLOAT_DTYPES

    def divisible(self, name: str) -> bool:
        """Whether rows can be read without the others: else a reader holds the tensor's stored bytes."""
        return self.checkpoint.part_reader(name) is not None

    def held_bytes(self, name: str) -> int:
        """What a `RowReader` of the tensor keeps in memory, at most."""
        # Rows in another order are turned, and types that have to be computed are, while the stored bytes are at hand.
        return 0 if self.divisible(name) else self.checkpoint.entry(name).nbytes + self._turned_bytes(name)

    def _turned_bytes(self, name: str) -> int:
        return max(self.checkpoint.entry(name).nbytes, self.checkpoint.stored_bytes(name))

    def reader(self, name: str) -> RowReader:
        """What reads the tensor by rows."""
        pair = None if self.adapter is None else self.adapter.pairs.get(name)
        return RowReader(self.checkpoint, name, pair, self._fusion)

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """Rows `first` to `last` (not included), fp32 [last - first, columns]; of a vector, its elements."""
        import torch

        reader = self.reader(name)
        out = torch.empty((last - first, *self.shape(name)[1:]), dtype=torch.float32)
        raw = np.empty((last - first) * reader.row_bytes, np.uint8)
        reader.fetch(first, last, raw)
        reader.decode(raw, first, last, out)
        return out

    def raw_equal(self, name: str, other: MergeSource, other_name: str) -> bool:
        """Whether two tensors are stored alike and have the same bytes; read until the first difference."""
        ours, theirs = self.checkpoint, other.checkpoint
        if self.is_adapted(name) or other.is_adapted(other_name):
            return False
        one, two = ours.entry(name), theirs.entry(other_name)
        if (one.dtype, one.shape, ours.format(name)) != (two.dtype, two.shape, theirs.format(other_name)):
            return False
        first, second = self.reader(name), other.reader(other_name)
        rows, step = first.rows, max(1, COMPARED_BYTES // max(1, first.row_bytes))
        buffers = [np.empty(min(step, rows) * first.row_bytes, np.uint8) for _ in range(2)]
        for start in range(0, rows, step):
            last = min(start + step, rows)
            parts = [buffer[: (last - start) * first.row_bytes] for buffer in buffers]
            first.fetch(start, last, parts[0])
            second.fetch(start, last, parts[1])
            if not np.array_equal(parts[0], parts[1]):
                return False
        return True

    def is_adapted(self, name: str) -> bool:
        """Whether the adapter changes this tensor."""
        return self.adapter is not None and name in self.adapter.pairs

    def _check_fusion(self, name: str) -> None:
        format = self.checkpoint.format(name)
        if self._fusion is not None and format is not None:
            self._fusion.check_format(format, f"{self.checkpoint.path}: {name}")


def open_source(reference: ModelReference) -> MergeSource:
    """Open a model and its adapter.

    Raises:
        InputError: either cannot be read, or the adapter was made for another model.
    """
    from quantlab.adapters.reading import is_adapter, local_adapter, read_adapter

    folder = Path(reference.model).expanduser()
    if is_adapter(folder) and not (folder / "config.json").exists():
        raise InputError(f"{reference}: is an adapter; name it with its base, as BASE+{reference.model}")
    checkpoint = open_checkpoint(reference.model, reference.revision)
    if reference.adapter is None:
        return MergeSource(checkpoint)
    return MergeSource(checkpoint, read_adapter(local_adapter(reference.adapter, reference.adapter_revision)))


def open_sources(references: tuple[ModelReference, ...]) -> Mapping[ModelReference, MergeSource]:
    """Open every model of a merge; a model with and without an adapter is opened once.

    Raises:
        InputError: one of them cannot be read.
    """
    return {reference: open_source(reference) for reference in references}
