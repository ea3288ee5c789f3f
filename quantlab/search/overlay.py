"""A checkpoint with some of its tensors quantized, in memory: to measure what one change does to a model."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from quantlab.checkpoint import Checkpoint, TensorEntry
from quantlab.checkpoint.read_ahead import PartReader
from quantlab.formats import BlockFormat, Recipe

Blocks = Mapping[str, tuple[BlockFormat, np.ndarray]]  # by full name: the format, and uint8 [rows, row_bytes]


class OverlaidCheckpoint(Checkpoint):
    """The tensors of `base`, a float checkpoint, but for those that `blocks` holds."""

    def __init__(self, base: Checkpoint, blocks: Blocks) -> None:
        self._base, self._blocks = base, blocks
        self.path, self.config, self.family = base.path, base.config, base.family
        self.tied, self.names, self.stored_names = base.tied, base.names, base.stored_names
        self.recipe = Recipe(tuple((name, format.name) for name, (format, _) in blocks.items()))

    def entry(self, name: str) -> TensorEntry:
        """As the file's, or U8 [rows, row_bytes]."""
        if name not in self._blocks:
            return self._base.entry(name)
        return TensorEntry(name, "U8", self._blocks[name][1].shape)

    def read_bytes(self, name: str) -> np.ndarray:
        """The file's, or the blocks' own."""
        return self._blocks[name][1].reshape(-1).copy() if name in self._blocks else self._base.read_bytes(name)

    def read_stored(self, stored_name: str) -> np.ndarray:
        return self._base.read_stored(stored_name)

    def full_name(self, stored_name: str) -> str:
        return self._base.full_name(stored_name)

    def stored_type(self, name: str) -> str:
        return self._blocks[name][0].name if name in self._blocks else self._base.stored_type(name)

    def part_reader(self, name: str) -> PartReader | None:
        return None if name in self._blocks else self._base.part_reader(name)
