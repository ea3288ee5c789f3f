"""What every writer of checkpoints offers: tensors are planned first, then each is written once, in any order."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np

from quantlab.checkpoint.families import family_of
from quantlab.checkpoint.positioned import write_all
from quantlab.checkpoint.tensors import FLOAT_DTYPES, TensorEntry, all_finite, dtype_name, raw_bytes
from quantlab.errors import InputError
from quantlab.formats import PackedTensor

if TYPE_CHECKING:
    import torch

    from quantlab.checkpoint.checkpoint import Checkpoint

CHECKSUM_DIGITS = 16  # of SHA-256, in hex: against accidents, not against forgers
READ_BACK = 1 << 22  # bytes at a time


class Companions(Protocol):
    """What a checkpoint's tokenizer files lie beside, or are in: a folder, or a GGUF file (`GgufCheckpoint`)."""

    path: Path


@dataclass(frozen=True)
class StoredPlace:
    """Where a tensor's bytes go: name there, file, first byte and number of bytes."""

    name: str
    descriptor: int
    offset: int
    nbytes: int


class CheckpointWriter(ABC):
    """A context manager that takes every planned tensor exactly once, and leaves a complete checkpoint.

    It appears when the block ends without an exception; before that, and after any failure, the destination is
    untouched.

    Args:
        destination: the folder or file to make.
        entries: all tensors under full names, linear weights as [out, in] (packed: U8 [rows, row_bytes]).
        config: config.json, `quantization_config` included.
        companions: the checkpoint, or a folder alone, whose tokenizer, chat template and licence go along.
        replace: whether an existing destination may be replaced.
        sidecars: JSON objects to keep beside the tensors, which `Checkpoint.sidecar` gives back by name.
        unfinished: the temporary form's place (same file system), for work that may be interrupted: it stays after a
            failure, and is gone on with if it is there (`take_up`).

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
        companions: Companions | None = None,
        replace: bool = False,
        sidecars: Mapping[str, dict[str, Any]] | None = None,
        unfinished: Path | None = None,
    ) -> None:
        self.unfinished = unfinished
        self.destination, self.config, self.companions, self.replace = destination, config, companions, replace
        self.sidecars = dict(sidecars or {})
        self.family = family_of(config, str(destination))
        self.entries = {entry.name: entry for entry in entries}
        assert len(self.entries) == len(entries), "tensor names repeat"
        self.tensor_bytes = sum(entry.nbytes for entry in entries)
        self.changed: list[str] = []
        self.notes: list[str] = []
        self._checksums: dict[str, str] = {}
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

    def writes_through(self, name: str) -> bool:
        """Whether `pieces` of a tensor go to the disk at once; others are held until they are complete."""
        return self._lies_as_given(self.entries[name])

    @contextlib.contextmanager
    def pieces(self, name: str) -> Iterator[Callable[[np.ndarray], None]]:
        """A function that takes the tensor's bytes (as `write_bytes` does) in consecutive pieces, uint8.

        Different tensors may be written by different threads. A tensor whose block ends with an exception is unwritten.
        """
        assert name in self._missing, f"{name}: not planned, or written twice"
        entry, done = self.entries[name], 0
        places = self._places(entry) if self._lies_as_given(entry) else []
        hasher, whole = hashlib.sha256(), np.empty(0 if places else entry.nbytes, np.uint8)

        def take(data: np.ndarray) -> None:
            nonlocal done
            for place in places:
                write_all(place.descriptor, data.data, place.offset + done)
            if places:
                hasher.update(data.data)
            else:
                whole[done : done + data.nbytes] = data
            done += data.nbytes

        yield take
        assert done == entry.nbytes, f"{name}: {done} bytes instead of {entry.nbytes}"
        if places:
            self._checksums |= {place.name: hasher.hexdigest()[:CHECKSUM_DIGITS] for place in places}
        else:
            self._store(entry, whole)
        self._missing.remove(name)

    def take_up(self, name: str, recorded: str) -> bool:
        """Count a tensor as written that an interrupted run left in `unfinished`, if its bytes there have the checksum
        that was `recorded` (`stored_checksum`).
        """
        places = self._places(self.entries[name])
        if not places or any(_checksum_of(place) != recorded for place in places):
            return False
        self._checksums |= dict.fromkeys((place.name for place in places), recorded)
        self._missing.remove(name)
        return True

    def stored_checksum(self, name: str) -> str | None:
        """The checksum of a written tensor's bytes in the file; None if `take_up` cannot do with it."""
        places = self._places(self.entries[name])
        return self._checksums[places[0].name] if places else None

    def sync(self) -> None:
        """Have the disk take what has been written so far; another thread may go on writing."""
        for descriptor in self._descriptors():
            with contextlib.suppress(OSError):  # the end of the block syncs once more, and reports
                os.fsync(descriptor)

    @abstractmethod
    def _descriptors(self) -> list[int]:
        """Of the open files that tensors go to."""

    @abstractmethod
    def _places(self, entry: TensorEntry) -> list[StoredPlace]:
        """Where the tensor's bytes lie, mostly in one place; none if they alone are not all of it."""

    @abstractmethod
    def _lies_as_given(self, entry: TensorEntry) -> bool:
        """Whether the tensor's bytes are stored as `write_bytes` takes them."""

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
        free = shutil.disk_usage(folder).free + _allocated(self.unfinished)
        if needed > free:
            raise InputError(
                f"{self.destination}: needs {needed / 1e9:.2f} GB, and the disk has {free / 1e9:.2f} GB free"
            )


def checksum(data: np.ndarray) -> str:
    """The checksum that quantlab keeps of a tensor's stored bytes."""
    return hashlib.sha256(data.data).hexdigest()[:CHECKSUM_DIGITS]


def _checksum_of(place: StoredPlace) -> str:
    """The checksum of what is stored there; empty if it ends before."""
    hasher, done, buffer = hashlib.sha256(), 0, bytearray(min(READ_BACK, place.nbytes))
    while done < place.nbytes:
        view = memoryview(buffer)[: min(len(buffer), place.nbytes - done)]
        count = os.preadv(place.descriptor, [view], place.offset + done)
        if not count:
            return ""
        hasher.update(view[:count])
        done += count
    return hasher.hexdigest()[:CHECKSUM_DIGITS]


def _allocated(path: Path | None) -> int:
    """Bytes of the disk that a file, or a folder's files, hold."""
    if path is None or not path.exists():
        return 0
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_blocks * 512 for file in files)


def open_writer(
    destination: Path,
    entries: Sequence[TensorEntry],
    config: dict[str, Any],
    *,
    companions: Companions | None = None,
    replace: bool = False,
    sidecars: Mapping[str, dict[str, Any]] | None = None,
    unfinished: Path | None = None,
) -> CheckpointWriter:
    """A writer of a GGUF file if the destination ends in `.gguf`, else of a Hugging Face folder."""
    from quantlab.checkpoint.folder_writer import FolderWriter
    from quantlab.checkpoint.gguf_writer import GgufWriter

    kind = GgufWriter if destination.suffix == ".gguf" else FolderWriter
    return kind(
        destination,
        entries,
        config,
        companions=companions,
        replace=replace,
        sidecars=sidecars,
        unfinished=unfinished,
    )
