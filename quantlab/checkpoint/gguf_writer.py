"""Write a GGUF file in one pass: the header is planned first, then tensors stream to their places."""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from quantlab.checkpoint.atomic import atomic_file
from quantlab.checkpoint.gguf_architectures import head_counts
from quantlab.checkpoint.gguf_config import metadata_of
from quantlab.checkpoint.gguf_header import Header, PlannedTensor, serialize_header
from quantlab.checkpoint.gguf_types import DEFAULT_ALIGNMENT, FLOAT_TYPES, PLAIN_TYPES
from quantlab.checkpoint.positioned import write_all
from quantlab.checkpoint.tensors import DTYPE_BYTES, TensorEntry, to_fp32
from quantlab.checkpoint.writer import CHECKSUM_DIGITS, CheckpointWriter, StoredPlace, checksum
from quantlab.errors import InputError
from quantlab.formats import FORMATS, Recipe

CHECKSUMS = "quantlab.checksums"
NORM_RESIDUALS = "quantlab.norm_residuals"
QUANTIZATION_VERSION = 2  # of ggml's block layouts
# llama.h's enum llama_ftype, which tells people what most of a file is.
FILE_TYPES = {"F32": 0, "F16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "BF16": 32, "tq2_0": 37}


@dataclass(frozen=True)
class _Layout:
    """The file to be. `computed` tensors follow from the configuration; `norms` are those whose residuals are kept."""

    header: Header
    tensors: list[PlannedTensor]
    computed: dict[str, np.ndarray]
    norms: list[TensorEntry]

    @property
    def file_bytes(self) -> int:
        last = max((tensor.offset + tensor.nbytes for tensor in self.tensors), default=0)
        return len(self.header.content) + _aligned(last)


class GgufWriter(CheckpointWriter):
    """Writes one GGUF file for llama.cpp and for us, with the tokenizer of `companions`; see `CheckpointWriter`.

    Two metadata values are filled in as tensors arrive: their checksums (hex digits of all, in the tensors' order), and
    for Gemma what fp32 loses of each norm weight when 1 is added to it, so that the way back is exact: the rounding
    error of a sum of two floats is a float itself.

    Raises:
        InputError: also, what GGUF or llama.cpp cannot hold of this model.
    """

    @property
    def file_bytes(self) -> int:
        """Of the whole file to be: header, padding and tensors. Known without opening, as `tensor_bytes` is then.

        Raises:
            InputError: what GGUF or llama.cpp cannot hold of this model.
        """
        return self._layout.file_bytes

    @cached_property
    def _layout(self) -> _Layout:
        source = str(self.destination)
        rows = self.entries[self.family.embedding].shape[0] if self.family.embedding in self.entries else 0
        described = metadata_of({**self.config, "tie_word_embeddings": self._is_tied()}, rows, source)
        self.notes.extend(described.notes)
        self._heads = head_counts(self.config, source)
        recipe = self.config.get("quantization_config")
        self._recipe = None if recipe is None else Recipe.from_config(recipe, source)
        self._types = {name: self._type_word(entry) for name, entry in self.entries.items()}
        planned = self._planned(described.tensors)
        self.tensor_bytes = sum(tensor.nbytes for tensor in planned)
        metadata = self._metadata(described.metadata, rows)
        metadata[CHECKSUMS] = "0" * CHECKSUM_DIGITS * len(planned)
        norms = [entry for entry in self.entries.values() if self.family.gguf_offset(entry.name)]
        if norms:
            metadata[NORM_RESIDUALS] = np.zeros(sum(entry.elements for entry in norms), np.float32)
        return _Layout(serialize_header(metadata, planned), planned, described.tensors, norms)

    def _open(self, stack: contextlib.ExitStack) -> None:
        layout = self._layout
        offsets = layout.header.value_offsets
        self._start_file(stack, layout)
        self._checksum_offset = offsets[CHECKSUMS]
        self._residual_offsets = dict(_running(layout.norms, offsets.get(NORM_RESIDUALS, 0)))
        for name, values in layout.computed.items():
            self._put(name, values.astype("<f4").view(np.uint8).reshape(-1))

    def _start_file(self, stack: contextlib.ExitStack, layout: _Layout) -> None:
        path = stack.enter_context(atomic_file(self.destination, self.replace, self.unfinished))
        header = layout.header.content
        self._planned_order = [tensor.name for tensor in layout.tensors]
        self._offsets = {tensor.name: (len(header) + tensor.offset, tensor.nbytes) for tensor in layout.tensors}
        self._check_disk_space(layout.file_bytes, path.parent)
        fresh = os.O_TRUNC if self.unfinished is None else 0
        self._descriptor = os.open(path, os.O_CREAT | os.O_RDWR | fresh, 0o644)
        stack.callback(os.close, self._descriptor)
        os.ftruncate(self._descriptor, layout.file_bytes)
        write_all(self._descriptor, memoryview(header), 0)

    def _is_tied(self) -> bool:
        return self.family.head not in self.entries

    def _type_word(self, entry: TensorEntry) -> str:
        """The element type to be: a block format's name, or a plain type."""
        where = f"{self.destination}: tensor {entry.name}"
        if self.family.gguf_name(entry.name) is None:
            raise InputError(f"{where}: has no place in a GGUF file of architecture {self.family.gguf.architecture}")
        if self.family.gguf.head == "never" and entry.name == self.family.head:
            raise InputError(f"{where}: llama.cpp takes this architecture's embedding for the head; theirs differ here")
        if entry.dtype == "U8":
            format = self._recipe.format_by_name(entry.name) if self._recipe is not None else None
            assert format is not None, f"{entry.name}: packed, and no rule tells its format"
            return format.name
        if entry.dtype not in (*FLOAT_TYPES, "F64"):
            raise InputError(f"{where}: holds {entry.dtype} numbers, which GGUF models do not")
        wants_fp32 = self.family.gguf_wants_fp32(entry.name, len(entry.shape)) or self.family.gguf_offset(entry.name)
        return "F32" if wants_fp32 or entry.dtype == "F64" else entry.dtype

    def _planned(self, extra: dict[str, np.ndarray]) -> list[PlannedTensor]:
        tensors = [PlannedTensor(name, PLAIN_TYPES["F32"], v.shape, 4 * v.size) for name, v in extra.items()]
        for entry in self.entries.values():
            tensors.extend(self._planned_tensor(name, entry) for name in self._gguf_names(entry.name))
        placed, offset = [], 0
        for tensor in tensors:
            placed.append(replace(tensor, offset=offset))
            offset = _aligned(offset + tensor.nbytes)
        return placed

    def _gguf_names(self, name: str) -> Iterator[str]:
        """Where a tensor goes: mostly one place."""
        gguf_name = self.family.gguf_name(name)
        assert gguf_name is not None
        yield gguf_name
        if name == self.family.embedding and self._is_tied() and self.family.gguf.head == "required":
            head = self.family.gguf_name(self.family.head)
            assert head is not None
            yield head

    def _planned_tensor(self, gguf_name: str, entry: TensorEntry) -> PlannedTensor:
        word = self._types[entry.name]
        if word in FORMATS:
            format = FORMATS[word]
            shape = (entry.shape[0], format.columns(entry.shape[1]))
            return PlannedTensor(gguf_name, format.ggml_type, shape, entry.nbytes)
        return PlannedTensor(gguf_name, PLAIN_TYPES[word], entry.shape, entry.elements * DTYPE_BYTES[word])

    def _metadata(self, architecture: dict[str, Any], rows: int) -> dict[str, Any]:
        from importlib.metadata import version

        # What a GGUF source says of itself (author, licence, base models) stays true of it.
        inherited = {key: value for key, value in self._source_metadata().items() if key.startswith("general.")}
        for key in ("general.alignment", "general.size_label"):
            inherited.pop(key, None)
        sizes: Counter[str] = Counter()
        for entry in self.entries.values():
            sizes[self._types[entry.name]] += entry.nbytes
        own: dict[str, Any] = {"general.type": "model", "quantlab.version": version("quantlab")}
        if self.companions is not None:
            own["general.name"] = self._source_metadata().get("general.name") or self.companions.path.stem
        if sizes:
            own["general.file_type"] = FILE_TYPES[sizes.most_common(1)[0][0]]
        if self._recipe is not None:
            own["general.quantization_version"] = QUANTIZATION_VERSION
            own["general.quantized_by"] = "quantlab"
            own["quantlab.method"] = str(self.config["quantization_config"].get("method", ""))
            own["quantlab.quantization"] = json.dumps(self.config["quantization_config"], sort_keys=True)
        own |= {f"quantlab.{name}": json.dumps(content, sort_keys=True) for name, content in self.sidecars.items()}
        first = {"general.architecture": architecture["general.architecture"]}
        return {**first, **inherited, **own, **architecture, **self._tokenizer_metadata(rows)}

    def _source_metadata(self) -> dict[str, Any]:
        return getattr(self.companions, "metadata", {})

    def _tokenizer_metadata(self, rows: int) -> dict[str, Any]:
        from quantlab.checkpoint.gguf_vocabulary import vocabulary_metadata

        if self.companions is None:
            return {"tokenizer.ggml.model": "no_vocab"}
        theirs = {key: value for key, value in self._source_metadata().items() if key.startswith("tokenizer.")}
        metadata = theirs or vocabulary_metadata(self.companions.path, rows)
        if "tokenizer.huggingface.json" in metadata:
            self.notes.append("tokenizer: on some texts llama.cpp's ids differ; tokenizer.json is in the file as well")
        return metadata

    def _store(self, entry: TensorEntry, data: np.ndarray) -> None:
        name, word = entry.name, self._types[entry.name]
        if word not in FORMATS and word != entry.dtype:
            data = self._to_fp32(entry, data)
        if offset := self.family.gguf_offset(name):
            data = self._add_offset(name, data.view("<f4"), np.float32(offset)).view(np.uint8)
        rows = self.family.gguf_rows(name, entry.shape[0], self._heads)
        if rows is not None:
            data = data.reshape(entry.shape[0], -1)[rows].reshape(-1)
        for gguf_name in self._gguf_names(name):
            self._put(gguf_name, data)

    def _to_fp32(self, entry: TensorEntry, data: np.ndarray) -> np.ndarray:
        values = to_fp32(data, entry.dtype)
        if entry.dtype == "F64" and not np.array_equal(values, data.view("<f8")):
            self.changed.append(entry.name)
        return values.view(np.uint8)

    def _add_offset(self, name: str, values: np.ndarray, offset: np.float32) -> np.ndarray:
        stored = values + offset
        residual = (values - (stored - offset)).astype("<f4")
        write_all(self._descriptor, residual.view(np.uint8).data, self._residual_offsets[name])
        return stored

    def _put(self, gguf_name: str, data: np.ndarray) -> None:
        write_all(self._descriptor, data.data, self._offsets[gguf_name][0])
        self._checksums[gguf_name] = checksum(data)

    def _descriptors(self) -> list[int]:
        return [self._descriptor]

    def _places(self, entry: TensorEntry) -> list[StoredPlace]:
        if self.family.gguf_offset(entry.name):  # the header holds a part of it, which is written anew
            return []
        names = self._gguf_names(entry.name)
        return [StoredPlace(name, self._descriptor, *self._offsets[name]) for name in names]

    def _lies_as_given(self, entry: TensorEntry) -> bool:
        word = self._types[entry.name]
        is_kept = (word in FORMATS or word == entry.dtype) and not self.family.gguf_offset(entry.name)
        return is_kept and self.family.gguf_rows(entry.name, entry.shape[0], self._heads) is None

    def _finish(self) -> None:
        digits = "".join(self._checksums[name] for name in self._planned_order)
        write_all(self._descriptor, memoryview(digits.encode()), self._checksum_offset)


def _aligned(offset: int) -> int:
    return -(-offset // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT


def _running(norms: list[TensorEntry], offset: int) -> Iterator[tuple[str, int]]:
    """Where each norm's residuals lie, in the norms' order."""
    for entry in norms:
        yield entry.name, offset
        offset += entry.nbytes * 4 // DTYPE_BYTES[entry.dtype]
