"""Write a Hugging Face folder in one pass: headers are planned first, then tensors stream to their places."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from quantlab.checkpoint.atomic import atomic_folder
from quantlab.checkpoint.families import family_of
from quantlab.checkpoint.tensors import DTYPE_BYTES, FLOAT_DTYPES, TensorEntry, dtype_name, raw_bytes, torch_tensor
from quantlab.errors import InputError
from quantlab.formats import PackedTensor

if TYPE_CHECKING:
    import torch

    from quantlab.checkpoint.reader import Checkpoint

MAX_SHARD_BYTES = 5_000_000_000  # the hub's convention
ALIGNMENT = 64  # bytes, of the data's start
# What a model folder holds beside weights and config; none of it is code.
COMPANION_FILES = (
    "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "LICENSE",
)  # fmt: skip


@dataclass
class _Shard:
    path: Path
    entries: list[TensorEntry]
    descriptor: int = -1


class CheckpointWriter:
    """A context manager that takes every planned tensor exactly once, in any order, and leaves a complete folder.

    The folder appears when the block ends without an exception; before that, and after any failure, the destination is
    untouched.

    Args:
        destination: the folder to make.
        entries: all tensors under full names, with the element type and shape as they will lie in the file (packed: U8
            [rows, row_bytes]; GPT-2's float linear weights: [in, out]).
        config: config.json, `quantization_config` included.
        replace: whether an existing destination may be replaced.

    Raises:
        InputError: see `atomic_folder`; or the disk is too small for the planned bytes.
    """

    def __init__(
        self,
        destination: Path,
        entries: Sequence[TensorEntry],
        config: dict[str, Any],
        *,
        replace: bool = False,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        self.destination, self.config, self.replace = destination, config, replace
        self.family = family_of(config, str(destination))
        self.entries = {entry.name: entry for entry in entries}
        assert len(self.entries) == len(entries), "tensor names repeat"
        self._max_shard_bytes = max_shard_bytes
        self._stack = contextlib.ExitStack()
        self._shards: list[_Shard] = []
        self._places: dict[str, tuple[_Shard, int]] = {}
        self._missing = set(self.entries)

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self.folder = stack.enter_context(atomic_folder(self.destination, self.replace))
            self._check_disk_space()
            self._plan_shards()
            for shard in self._shards:
                self._start(shard)
                stack.callback(os.close, shard.descriptor)
            self._write_json("config.json", self.config)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self._missing:
            unwritten = AssertionError(f"planned but never written: {', '.join(sorted(self._missing))}")
            self._stack.__exit__(AssertionError, unwritten, None)
            raise unwritten
        self._stack.__exit__(kind, error, trace)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write a plain tensor; linear weights as [out, in]. Its element type must be the planned one."""
        self.write_stored(name, tensor.T if self.family.is_transposed(name) else tensor)

    def write_stored(self, name: str, tensor: torch.Tensor) -> None:
        """Write a plain tensor that lies as in the file already (GPT-2's linear weights: [in, out])."""
        entry = self.entries[name]
        assert (dtype_name(tensor.dtype), tuple(tensor.shape)) == (entry.dtype, entry.shape), f"{name}: not as planned"
        self._write_bytes(name, raw_bytes(tensor.cpu()))

    def write_packed(self, name: str, packed: PackedTensor) -> None:
        """Write the blocks of a packed tensor."""
        entry = self.entries[name]
        assert (entry.dtype, entry.shape) == ("U8", tuple(packed.blocks.shape)), f"{name}: not as planned"
        self._write_bytes(name, raw_bytes(packed.blocks.cpu()))

    def copy(self, name: str, checkpoint: Checkpoint) -> None:
        """Copy a tensor's stored bytes from another checkpoint of the same family.

        Raises:
            InputError: it holds NaN or infinity.
        """
        data, entry = checkpoint.read_bytes(name), checkpoint.entry(name)
        if entry.dtype in FLOAT_DTYPES and not bool(torch_tensor(data, entry).isfinite().all()):
            raise InputError(f"{checkpoint.path}: {name}: holds NaN or infinity; the checkpoint is damaged")
        self._write_bytes(name, data)

    def copy_companions(self, folder: Path) -> None:
        """Copy tokenizer files, chat template, generation settings and licence, as far as `folder` has them."""
        for name in COMPANION_FILES:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, self.folder / name)

    def add_file(self, name: str, content: bytes) -> None:
        """Add a further file."""
        (self.folder / name).write_bytes(content)

    def _write_bytes(self, name: str, data: np.ndarray) -> None:
        assert name in self._missing, f"{name}: not planned, or written twice"
        assert data.nbytes == self.entries[name].nbytes, f"{name}: not as planned"
        shard, offset = self._places[name]
        _write_all(shard.descriptor, data.data, offset)
        self._missing.remove(name)

    def _check_disk_space(self) -> None:
        needed = sum(entry.nbytes for entry in self.entries.values())
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise InputError(
                f"{self.destination}: needs {needed / 1e9:.2f} GB, and the disk has {free / 1e9:.2f} GB free"
            )

    def _plan_shards(self) -> None:
        groups: list[list[TensorEntry]] = [[]]
        filled = 0
        for entry in self.entries.values():
            if groups[-1] and filled + entry.nbytes > self._max_shard_bytes:
                groups.append([])
                filled = 0
            groups[-1].append(entry)
            filled += entry.nbytes
        count = len(groups)
        names = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
        names = ["model.safetensors"] if count == 1 else names
        self._shards = [_Shard(self.folder / name, group) for name, group in zip(names, groups, strict=True)]
        if count > 1:
            weight_map = {entry.name: shard.path.name for shard in self._shards for entry in shard.entries}
            total = sum(entry.nbytes for entry in self.entries.values())
            self._write_json(
                "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
            )

    def _start(self, shard: _Shard) -> None:
        """Write the header and set the file's size; the data is written in any order."""
        fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        # Widest elements first, which keeps every tensor aligned to its element size, as the library writes them.
        for entry in sorted(shard.entries, key=lambda e: (-DTYPE_BYTES[e.dtype], e.name)):
            span = [offset, offset + entry.nbytes]
            fields[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": span}
            offset += entry.nbytes
        header = json.dumps(fields, separators=(",", ":")).encode()
        header += b" " * (-(8 + len(header)) % ALIGNMENT)
        shard.descriptor = os.open(shard.path, os.O_CREAT | os.O_RDWR | os.O_TRUNC, 0o644)
        _write_all(shard.descriptor, memoryview(struct.pack("<Q", len(header)) + header), 0)
        start = 8 + len(header)
        os.ftruncate(shard.descriptor, start + offset)
        for entry in shard.entries:
            self._places[entry.name] = (shard, start + fields[entry.name]["data_offsets"][0])

    def _write_json(self, name: str, data: dict[str, Any]) -> None:
        (self.folder / name).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    """Write `data` at `offset`; the system may take it in pieces."""
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)
