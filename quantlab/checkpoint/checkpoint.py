"""What every checkpoint offers, whatever its files: named tensors, read one at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quantlab.checkpoint.families import Family
from quantlab.checkpoint.read_ahead import PartReader, read_ahead
from quantlab.checkpoint.tensors import TensorEntry, torch_tensor
from quantlab.errors import InputError
from quantlab.formats import BlockFormat, PackedTensor, Recipe

if TYPE_CHECKING:
    import torch


class Checkpoint(ABC):
    """Named tensors. Linear weights are [out, in] under full Hugging Face names, whatever the files do.

    A head that is tied to the embedding is not listed; `tied` tells. The entry of a packed tensor is U8 [rows,
    row_bytes]; `shape` and `read` speak of its weights, `read_packed` of its blocks.

    Attributes:
        path: folder or file.
        config: as in config.json.
        family: the model family's row.
        recipe: which tensors are packed in what; None for a float checkpoint.
        names: all tensors, in the files' order.
        stored_names: all tensors under the names that the files give them, those included that `names` leaves out.
    """

    path: Path
    config: dict[str, Any]
    family: Family
    recipe: Recipe | None
    tied: bool
    names: tuple[str, ...]
    stored_names: tuple[str, ...]

    @abstractmethod
    def entry(self, name: str) -> TensorEntry:
        """Element type and shape of what `read_bytes` gives.

        Raises:
            InputError: there is no such tensor.
        """

    @abstractmethod
    def read_bytes(self, name: str) -> np.ndarray:
        """The tensor's bytes, [out, in] for linear weights, as a fresh uint8 array; needs no torch."""

    @abstractmethod
    def read_stored(self, stored_name: str) -> np.ndarray:
        """A tensor's bytes as they lie in the file, by its name there."""

    @abstractmethod
    def full_name(self, stored_name: str) -> str:
        """The full Hugging Face name of a stored tensor; its own where it has none."""

    def stored_type(self, name: str) -> str:
        """What the file keeps the tensor in: a block format's name, or an element type in lower case."""
        format = self.format(name)
        return self.entry(name).dtype.lower() if format is None else format.name

    def stored_bytes(self, name: str) -> int:
        """Bytes of the tensor in the file."""
        return self.entry(name).nbytes

    @cached_property
    def parameters(self) -> int:
        """Number of weights, those of packed tensors included; a tied head counts once."""
        return sum(int(np.prod(self.shape(name), dtype=np.int64)) for name in self.names)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all tensors in the files."""
        return sum(self.stored_bytes(name) for name in self.names)

    def format(self, name: str) -> BlockFormat | None:
        """The block format that tensor `name` is packed in; None for a plain one."""
        if self.recipe is None or self.entry(name).dtype != "U8":
            return None
        return self.recipe.format_by_name(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """The weights' shape: [out, in] for linear weights."""
        shape = self.entry(name).shape
        format = self.format(name)
        return shape if format is None else (shape[0], format.columns(shape[1]))

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weights (dequantized where packed), in `dtype` or else as stored (packed: fp32)."""
        if self.format(name) is not None:
            return self.read_packed(name).dequantize(dtype)
        tensor = torch_tensor(self.read_bytes(name), self.entry(name))
        return tensor if dtype is None else tensor.to(dtype)

    def read_packed(self, name: str) -> PackedTensor:
        """The blocks of a packed tensor.

        Raises:
            InputError: the tensor is not packed.
        """
        format = self.format(name)
        if format is None:
            raise InputError(f"{self.path}: tensor {name} is not quantized")
        return PackedTensor(torch_tensor(self.read_bytes(name), self.entry(name)), format)

    def read_rows(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        """The bytes of a matrix some rows at a time: (first row, uint8 [rows, bytes a row]), while memory stays flat.

        An array is good until the next one is asked for. Where rows lie otherwise in the file, all come at once.
        """
        entry, source = self.entry(name), self.part_reader(name)
        if source is None:
            yield 0, self.read_bytes(name).reshape(entry.shape[0], -1)
        else:
            yield from read_ahead(source, entry.shape[0], entry.nbytes // entry.shape[0])

    def part_reader(self, name: str) -> PartReader | None:
        """What reads parts of the tensor, if its bytes lie in the file as `read_bytes` gives them; it may be called by
        several threads at a time.
        """
        return None

    def sidecar(self, name: str) -> dict[str, Any] | None:
        """A JSON object that a writer kept beside the tensors (`CheckpointWriter`); None if there is none.

        Raises:
            InputError: it is there, and is no JSON object.
        """
        return None

    def no_such_tensor(self, name: str) -> InputError:
        """The error for a name that is not listed."""
        return InputError(f"{self.path}: holds no tensor {name}")
