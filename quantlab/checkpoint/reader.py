"""Open a Hugging Face folder lazily: headers now, tensors one at a time when they are asked for."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quantlab.checkpoint.families import Family, family_of
from quantlab.checkpoint.safetensors_file import SafetensorsFile
from quantlab.checkpoint.source import local_folder
from quantlab.checkpoint.tensors import TensorEntry, torch_tensor
from quantlab.checkpoint.torch_file import TorchFile
from quantlab.errors import InputError
from quantlab.formats import BlockFormat, PackedTensor, Recipe

if TYPE_CHECKING:
    import torch

SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


class Checkpoint:
    """Named tensors of a folder. Linear weights are [out, in] under full Hugging Face names, whatever the files do.

    A head that is tied to the embedding is not listed; `tied` tells. Quantized tensors are uint8 rows of blocks in the
    file; `shape` and `read` speak of the weights, `read_packed` of the blocks.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_json(path / "config.json")
        self.family: Family = family_of(self.config, str(path / "config.json"))
        quantization = self.config.get("quantization_config")
        self.recipe: Recipe | None = None
        if quantization is not None:
            if not isinstance(quantization, dict):
                raise InputError(f"{path / 'config.json'}: quantization_config is no JSON object")
            self.recipe = Recipe.from_config(quantization, str(path / "config.json"))
        self._files: dict[str, SafetensorsFile | TorchFile] = {}
        self._stored: dict[str, tuple[SafetensorsFile | TorchFile, TensorEntry]] = {}
        for file in _open_files(path):
            self._add_file(file)
        self.tied = bool(self.config.get("tie_word_embeddings", self.family.tied_by_default)) and self._drop_tied_head()
        self.names: tuple[str, ...] = tuple(self._stored)
        for name in self.names:
            self._check_packing(name)

    @cached_property
    def parameters(self) -> int:
        """Number of weights, those of packed tensors included; a tied head counts once."""
        return sum(int(np.prod(self.shape(name), dtype=np.int64)) for name in self.names)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all tensors in the files."""
        return sum(self.entry(name).nbytes for name in self.names)

    def entry(self, name: str) -> TensorEntry:
        """Element type and shape as stored.

        Raises:
            InputError: there is no such tensor.
        """
        return self._lookup(name)[1]

    def format(self, name: str) -> BlockFormat | None:
        """The block format that tensor `name` is packed in; None for a plain one."""
        if self.recipe is None or self.entry(name).dtype != "U8":
            return None
        return self.recipe.format_by_name(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """The weights' shape: [out, in] for linear weights."""
        shape = self.entry(name).shape
        format = self.format(name)
        if format is not None:
            return shape[0], format.columns(shape[1])
        return shape[::-1] if self.family.is_transposed(name) else shape

    def read_bytes(self, name: str) -> np.ndarray:
        """The stored bytes, a fresh uint8 array; needs no torch."""
        file, entry = self._lookup(name)
        return file.read(entry.name)

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weights (dequantized where packed), in `dtype` or else as stored (packed: fp32)."""
        if self.format(name) is not None:
            return self.read_packed(name).dequantize(dtype)
        tensor = torch_tensor(self.read_bytes(name), self.entry(name))
        if self.family.is_transposed(name):
            tensor = tensor.T
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

    def _lookup(self, name: str) -> tuple[SafetensorsFile | TorchFile, TensorEntry]:
        try:
            return self._stored[name]
        except KeyError:
            raise InputError(f"{self.path}: holds no tensor {name}") from None

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


def open_checkpoint(model: str | Path) -> Checkpoint:
    """Open a folder or a hub id.

    Raises:
        InputError: what is missing or wrong, with the file's name.
    """
    return Checkpoint(local_folder(model))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InputError: missing, unreadable, or something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path.parent}: holds no {path.name}; is this a model folder?") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise InputError(f"{path}: not valid JSON; download it again") from None
    if not isinstance(data, dict):
        raise InputError(f"{path}: not a JSON object")
    return data


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
        if not (index.parent / shard).is_file():
            raise InputError(f"{index}: names {shard}, which is missing; download it")
    return shards
