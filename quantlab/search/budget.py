"""How many bytes a choice of formats takes in its destination, before anything is written."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from quantlab.checkpoint import Checkpoint, TensorEntry
from quantlab.checkpoint.gguf_writer import GgufWriter
from quantlab.formats import BlockFormat, Recipe
from quantlab.search.candidates import CANDIDATES

Formats = Mapping[str, BlockFormat]


class Budget:
    """The arithmetic of one checkpoint and destination: what its report's `bytes` and `bits_per_weight` will say.

    Args:
        names: the tensors that get a format; all others are copied as the destination stores them.
    """

    def __init__(self, checkpoint: Checkpoint, names: tuple[str, ...], out: Path) -> None:
        self._checkpoint, self._out, self.names = checkpoint, out, names
        self.parameters = checkpoint.parameters

    def bytes_of(self, formats: Formats) -> int:
        """Bytes of all tensors in the destination."""
        return self._fixed + sum(self.tensor_bytes(name, format) for name, format in formats.items())

    def tensor_bytes(self, name: str, format: BlockFormat) -> int:
        """What one tensor takes; twice where the destination wants a tied matrix twice."""
        return self._copies.get(name, 1) * _packed(self._checkpoint, name, format).nbytes

    def bits_per_weight(self, total: int) -> float:
        """Of that many bytes, over all parameters."""
        return 8 * total / max(1, self.parameters)

    def bytes_at(self, bits_per_weight: float) -> int:
        """The most bytes within that many bits per weight."""
        return int(bits_per_weight * self.parameters / 8 + 1e-6)

    @cached_property
    def _fixed(self) -> int:
        smallest = dict.fromkeys(self.names, CANDIDATES[0])
        return self._destination_bytes(smallest) - sum(self.tensor_bytes(n, f) for n, f in smallest.items())

    @cached_property
    def _copies(self) -> dict[str, int]:
        name = self._checkpoint.family.embedding
        if name not in self.names or self._out.suffix != ".gguf":
            return {}
        smallest = dict.fromkeys(self.names, CANDIDATES[0])
        larger = {**smallest, name: CANDIDATES[1]}
        difference = self._destination_bytes(larger) - self._destination_bytes(smallest)
        packed = [_packed(self._checkpoint, name, format).nbytes for format in CANDIDATES[:2]]
        return {name: difference // (packed[1] - packed[0])}

    def _destination_bytes(self, formats: Formats) -> int:
        entries = []
        for name in self._checkpoint.names:
            stored = self._checkpoint.entry(name)
            entry = TensorEntry(name, stored.dtype, stored.shape)
            entries.append(_packed(self._checkpoint, name, formats[name]) if name in formats else entry)
        if self._out.suffix != ".gguf":
            return sum(entry.nbytes for entry in entries)
        recipe = Recipe(tuple((name, format.name) for name, format in formats.items()))
        tying = {"tie_word_embeddings": self._checkpoint.tied}
        config = {**self._checkpoint.config, **tying, "quantization_config": recipe.to_config()}
        writer = _PlanningWriter(self._out, entries, config, companions=self._checkpoint)
        with contextlib.suppress(_PlannedError), writer:
            pass
        return writer.tensor_bytes


class _PlannedError(Exception):
    """The file would be begun now."""


class _PlanningWriter(GgufWriter):
    """Stops before it touches the disk."""

    def _start_file(self, *_: Any) -> None:
        raise _PlannedError


def _packed(checkpoint: Checkpoint, name: str, format: BlockFormat) -> TensorEntry:
    rows, columns = checkpoint.shape(name)
    return TensorEntry(name, "U8", (rows, format.row_bytes(columns)))
