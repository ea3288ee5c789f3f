"""Open a Hugging Face folder lazily: headers now, tensors one at a time when they are asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from quantlab.checkpoint.checkpoint import Checkpoint
from quantlab.checkpoint.families import family_of
from quantlab.checkpoint.json_file import read_json
from quantlab.checkpoint.read_ahead import PartReader
from quantlab.checkpoint.safetensors_file import SafetensorsFile
from quantlab.checkpoint.tensors import DTYPE_BYTES, TensorEntry
from quantlab.checkpoint.torch_file import TorchFile
from quantlab.errors import InputError
from quantlab.formats import Recipe

SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


class HuggingFaceFolder(Checkpoint):
    """A folder of config.json and safetensors (or legacy .bin) files; see `Checkpoint`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_json(path / "config.json")
        self.family = family_of(self.config, str(path / "config.json"))
        quantization = self.config.get("quantization_config")
        self.recipe: Recipe | None = None
        if quantization is not None:
            if not isinstance(quantization, dict):
                raise InputError(f"{path / 'config.json'}: quantization_config is no JSON object")
            self.recipe = Recipe.from_config(quantization, str(path / "config.json"))
        self._stored: dict[str, tuple[SafetensorsFile | TorchFile, TensorEntry]] = {}
        files = _open_files(path)
        for file in files:
            self._add_file(file)
        self._holders = {name: file for file in files for name in file.entries}
        self.stored_names = tuple(self._holders)
        self.tied = bool(self.config.get("tie_word_embeddings", self.family.tied_by_default)) and self._drop_tied_head()
        self.names: tuple[str, ...] = tuple(self._stored)
        for name in self.names:
            self._check_packing(name)

    def entry(self, name: str) -> TensorEntry:
        stored = self._lookup(name)[1]
        shape = stored.shape[::-1] if self._lies_transposed(name) else stored.shape
        return TensorEntry(name, stored.dtype, shape)

    def read_bytes(self, name: str) -> np.ndarray:
        file, entry = self._lookup(name)
        data = file.read(entry.name)
        if not self._lies_transposed(name):
            return data
        elements = data.view(f"V{DTYPE_BYTES[entry.dtype]}").reshape(entry.shape)
        return np.ascontiguousarray(elements.T).reshape(-1).view(np.uint8)

    def read_stored(self, stored_name: str) -> np.ndarray:
        return self._holders[stored_name].read(stored_name)

    def part_reader(self, name: str) -> PartReader | None:
        file, entry = self._lookup(name)
        if self._lies_transposed(name) or not isinstance(file, SafetensorsFile):
            return None
        return lambda begin, out: file.read_part(entry.name, begin, out)

    def full_name(self, stored_name: str) -> str:
        return self.family.full_name(stored_name)

    def sidecar(self, name: str) -> dict[str, Any] | None:
        file = self.path / f"{name}.json"
        return read_json(file) if file.is_file() else None

    def _lies_transposed(self, name: str) -> bool:
        entry = self._lookup(name)[1]
        return entry.dtype != "U8" and len(entry.shape) == 2 and self.family.is_transposed(name)

    def _lookup(self, name: str) -> tuple[SafetensorsFile | TorchFile, TensorEntry]:
        try:
            return self._stored[name]
        except KeyError:
            raise self.no_such_tensor(name) from None

    def _add_file(self, file: SafetensorsFile | TorchFile) -> None:
        for stored_name, entry in file.entries.items():
            name = self.family.full_name(stored_name)
            if self.family.is_derived(name):
                continue
            if name in self._stored:
                raise InputError(f"{file.path}: tensor {name} is in {self._stored[name][0].path.name} too")
            self._stored[name] = (file, entry)

    def _drop_tied_head(self) -> bool:
        """Forget a stored copy of the embedding; False if the head differs, which then counts, as in transformers."""
        embedding, head = self.family.embedding, self.family.head
        if head not in self._stored:
            return True
        if embedding in self._stored and self.entry(head).shape == self.entry(embedding).shape:
            if not np.array_equal(self.read_bytes(head), self.read_bytes(embedding)):
                return False
            del self._stored[head]
        return True

    def _check_packing(self, name: str) -> None:
        """A uint8 tensor must be rows of whole blocks of the format that the recipe names."""
        entry = self.entry(name)
        if entry.dtype != "U8":
            return
        format = self.recipe.format_by_name(name) if self.recipe is not None else None
        where = f"{self._lookup(name)[0].path}: tensor {name}"
        if format is None:
            raise InputError(f"{where}: holds bytes, and quantization_config in config.json gives it no format")
        if len(entry.shape) != 2 or entry.shape[1] == 0 or entry.shape[1] % format.block_bytes:
            raise InputError(f"{where}: shape {list(entry.shape)} is no rows of {format.block_bytes}-byte blocks")


def _open_files(path: Path) -> list[SafetensorsFile | TorchFile]:
    for single, index in zip(SINGLE_FILES, INDEX_FILES, strict=True):
        kind = SafetensorsFile if single.endswith(".safetensors") else TorchFile
        if (path / index).is_file():
            return [kind(path / shard) for shard in _shards(path / index)]
        if (path / single).is_file():
            return [kind(path / single)]
    raise InputError(f"{path}: holds neither {SINGLE_FILES[0]} nor {SINGLE_FILES[1]}, nor an index of shards")


def _shards(index: Path) -> list[str]:
    """The shard files that an index names, in order of first mention; each must be a plain name beside it."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise InputError(f"{index}: weight_map must be an object of tensor names and file names")
    shards = list(dict.fromkeys(weight_map.values()))
    for shard in shards:
        if Path(shard).name != shard or shard in ("", ".."):
            raise InputError(f"{index}: shard {shard!r} is no plain file name")
        if not _is_file(index.parent / shard):
            raise InputError(f"{index}: names {shard}, which is missing; download it")
    return shards


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # no system has names as long as this one
        return False
