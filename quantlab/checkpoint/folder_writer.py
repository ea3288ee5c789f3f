"""Write a Hugging Face folder in one pass: headers are planned first, then tensors stream to their places."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quantlab.checkpoint.atomic import atomic_folder
from quantlab.checkpoint.positioned import write_all
from quantlab.checkpoint.tensors import DTYPE_BYTES, TensorEntry
from quantlab.checkpoint.writer import CheckpointWriter, Companions, StoredPlace, checksum

MAX_SHARD_BYTES = 5_000_000_000  # the hub's convention
ALIGNMENT = 64  # bytes, of the data's start
CHECKSUM_FILE = "checksums.json"
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


class FolderWriter(CheckpointWriter):
    """Writes config.json and safetensors files, sharded where they grow beyond `max_shard_bytes`, with the tokenizer of
    `companions`; see `CheckpointWriter`.
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
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        super().__init__(
            destination,
            entries,
            config,
            companions=companions,
            replace=replace,
            sidecars=sidecars,
            unfinished=unfinished,
        )
        self._max_shard_bytes = max_shard_bytes
        self._shards: list[_Shard] = []
        self._offsets: dict[str, tuple[_Shard, int]] = {}

    def copy_companions(self, folder: Path) -> None:
        """Copy tokenizer files, chat template, generation settings and licence, as far as `folder` has them."""
        for name in COMPANION_FILES:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, self.folder / name)

    def add_file(self, name: str, content: bytes) -> None:
        """Add a further file."""
        (self.folder / name).write_bytes(content)

    def _open(self, stack: contextlib.ExitStack) -> None:
        self.folder = stack.enter_context(atomic_folder(self.destination, self.replace, self.unfinished))
        self._check_disk_space(self.tensor_bytes + self._companion_bytes(), self.folder)
        self._plan_shards()
        for shard in self._shards:
            self._start(shard)
            stack.callback(os.close, shard.descriptor)
        self._write_json("config.json", self.config)
        for name, content in self.sidecars.items():
            self._write_json(f"{name}.json", content)
        if self.companions is not None:
            self._add_companions(self.companions)

    def _add_companions(self, source: Companions) -> None:
        from quantlab.checkpoint.gguf_checkpoint import GgufCheckpoint

        if isinstance(source, GgufCheckpoint):
            from quantlab.checkpoint.gguf_tokenizer import tokenizer_files

            for name, content in tokenizer_files(source.metadata, str(source.path)).items():
                self.add_file(name, content)
        else:
            self.copy_companions(source.path)

    def _companion_bytes(self) -> int:
        if self.companions is None or not self.companions.path.is_dir():
            return 0
        files = (self.companions.path / name for name in COMPANION_FILES)
        return sum(file.stat().st_size for file in files if file.is_file())

    def _store(self, entry: TensorEntry, data: np.ndarray) -> None:
        if self._lies_transposed(entry):
            elements = data.view(f"V{DTYPE_BYTES[entry.dtype]}").reshape(entry.shape)
            data = np.ascontiguousarray(elements.T).reshape(-1).view(np.uint8)
        shard, offset = self._offsets[entry.name]
        write_all(shard.descriptor, data.data, offset)
        self._checksums[entry.name] = checksum(data)

    def _descriptors(self) -> list[int]:
        return [shard.descriptor for shard in self._shards]

    def _places(self, entry: TensorEntry) -> list[StoredPlace]:
        shard, offset = self._offsets[entry.name]
        return [StoredPlace(entry.name, shard.descriptor, offset, entry.nbytes)]

    def _lies_as_given(self, entry: TensorEntry) -> bool:
        return not self._lies_transposed(entry)

    def _finish(self) -> None:
        self._write_json(CHECKSUM_FILE, {name: self._checksums[name] for name in self.entries})

    def _lies_transposed(self, entry: TensorEntry) -> bool:
        return entry.dtype != "U8" and len(entry.shape) == 2 and self.family.is_transposed(entry.name)

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
            shape = entry.shape[::-1] if self._lies_transposed(entry) else entry.shape
            fields[entry.name] = {"dtype": entry.dtype, "shape": list(shape), "data_offsets": span}
            offset += entry.nbytes
        header = json.dumps(fields, separators=(",", ":")).encode()
        header += b" " * (-(8 + len(header)) % ALIGNMENT)
        fresh = os.O_TRUNC if self.unfinished is None else 0
        shard.descriptor = os.open(shard.path, os.O_CREAT | os.O_RDWR | fresh, 0o644)
        write_all(shard.descriptor, memoryview(struct.pack("<Q", len(header)) + header), 0)
        start = 8 + len(header)
        os.ftruncate(shard.descriptor, start + offset)
        for entry in shard.entries:
            self._offsets[entry.name] = (shard, start + fields[entry.name]["data_offsets"][0])

    def _write_json(self, name: str, data: dict[str, Any]) -> None:
        (self.folder / name).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
