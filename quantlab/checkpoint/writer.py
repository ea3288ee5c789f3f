"""What every writer of checkpoints offers: tensors are planned first, then each is written once, in any order."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from quantlab.checkpoint.families import family_of
from quantlab.checkpoint.tensors import FLOAT_DTYPES, TensorEntry, all_finite, dtype_name, raw_bytes
from quantlab.errors import InputError
from quantlab.formats import PackedTensor

if TYPE_CHECKING:
    import torch

    from quantlab.checkpoint.checkpoint import Checkpoint

CHECKSUM_DIGITS = 16  # of SHA-256, in hex: against accidents, not against forgers


class CheckpointWriter(ABC):
    """A context manager that takes every planned tensor exactly once, and leaves a complete checkpoint.

    It appears when the block ends without an exception; before that, and after any failure, the destination is
    untouched.

    Args:
        destination: the folder or file to make.
        entries: all tensors under full names, linear weights as [out, in] (packed: U8 [rows, row_bytes]).
        config: config.json, `quantization_config` included.
        companions: the checkpoint whose tokenizer, chat template and licence go along.
        replace: whether an existing destination may be replaced.
        sidecars: JSON objects to keep beside the tensors, which `Checkpoint.sidecar` gives back by name.

    Attributes:
        tensor_bytes: of all tensors, as the destination stores them; known once the block is entered.
        changed: names of the tensors whose values the destination cannot hold exactly.
        notes: what the user should know of the result, a line each.

    Raises:
        InputError: the destination exists and may not be replaced, cannot be written, or its disk is too small.
    """

    def __init__(
        self,
        destination: Path,
        entries: Sequence[TensorEntry],
        config: dict[str, Any],
        *,
        companions: Checkpoint | None = None,
        replace: bool = False,
        sidecars: Mapping[str, dict[str, Any]] | None = None,
    ) -> None:
        self.destination, self.config, self.companions, self.replace = destination, config, companions, replace
        self.sidecars = dict(sidecars or {})
        self.family = family_of(config, str(destination))
        self.entries = {entry.name: entry for entry in entries}
        assert len(self.entries) == len(entries), "tensor names repeat"
        self.tensor_bytes = sum(entry.nbytes for entry in entries)
        self.changed: list[str] = []
        self.notes: list[str] = []
        self._missing = set(self.entries)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self._open(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                assert not self._missing, f"planned but never written: {', '.join(sorted(self._missing))}"
                self._finish()
        except BaseException as failure:
            self._stack.__exit__(type(failure), failure, failure.__traceback__)
            raise
        self._stack.__exit__(kind, error, trace)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write a plain tensor, linear weights as [out, in]; its element type must be the planned one."""
        self.write_bytes(
            name, raw_bytes(tensor.cpu()), TensorEntry(name, dtype_name(tensor.dtype), tuple(tensor.shape))
        )

    def write_packed(self, name: str, packed: PackedTensor) -> None:
        """Write the blocks of a packed tensor."""
        self.write_bytes(name, raw_bytes(packed.blocks.cpu()), TensorEntry(name, "U8", tuple(packed.blocks.shape)))

    def copy(self, name: str, checkpoint: Checkpoint) -> None:
        """Copy a tensor from another checkpoint of the same family.

        Raises:
            InputError: it holds NaN or infinity.
        """
        data, entry = checkpoint.read_bytes(name), checkpoint.entry(name)
        if entry.dtype in FLOAT_DTYPES and not all_finite(data, entry.dtype):
            raise InputError(f"{checkpoint.path}: {name}: holds NaN or infinity; the checkpoint is damaged")
        self.write_bytes(name, data, entry)

    def write_bytes(self, name: str, data: np.ndarray, entry: TensorEntry) -> None:
        """Write raw bytes (uint8 [nbytes]) that `entry` describes; it must be as planned."""
        assert name in self._missing, f"{name}: not planned, or written twice"
        planned = self.entries[name]
        assert (entry.dtype, entry.shape, data.nbytes) == (planned.dtype, planned.shape, planned.nbytes), (
            f"{name}: not as planned"
        )
        self._store(planned, data)
        self._missing.remove(name)

    @abstractmethod
    def _open(self, stack: contextlib.ExitStack) -> None:
        """Make the destination's temporary form, with everything that is known before the tensors."""

    @abstractmethod
    def _store(self, entry: TensorEntry, data: np.ndarray) -> None:
        """Put a tensor's bytes into its place."""

    @abstractmethod
    def _finish(self) -> None:
        """Add what is known after the tensors only."""

    def _check_disk_space(self, needed: int, folder: Path) -> None:
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise InputError(
                f"{self.destination}: needs {needed / 1e9:.2f} GB, and the disk has {free / 1e9:.2f} GB free"
            )


def checksum(data: np.ndarray) -> str:
    """The checksum that quantlab keeps of a tensor's stored bytes."""
    return hashlib.sha256(data.data).hexdigest()[:CHECKSUM_DIGITS]


def open_writer(
    destination: Path,
    entries: Sequence[TensorEntry],
    config: dict[str, Any],
    *,
    companions: Checkpoint | None = None,
    replace: bool = False,
    sidecars: Mapping[str, dict[str, Any]] | None = None,
) -> CheckpointWriter:
    """A writer of a GGUF file if the destination ends in `.gguf`, else of a Hugging Face folder."""
    if destination.suffix == ".gguf":
        from quantlab.checkpoint.gguf_writer import GgufWriter

        return GgufWriter(destination, entries, config, companions=companions, replace=replace, sidecars=sidecars)
    from quantlab.checkpoint.folder_writer import FolderWriter

    return FolderWriter(destination, entries, config, companions=companions, replace=replace, sidecars=sidecars)
