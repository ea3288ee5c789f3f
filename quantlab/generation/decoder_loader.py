"""A checkpoint's tensors become the decoder's weights, some rows at a time."""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Iterator
from dataclasses import asdict

import numpy as np

from quantlab import native
from quantlab.checkpoint import Checkpoint
from quantlab.checkpoint.tensors import to_fp32
from quantlab.errors import InputError
from quantlab.formats import FORMATS
from quantlab.formats.packing import pack_rows
from quantlab.generation.decoder_description import Description, rotary_table
from quantlab.generation.decoder_layout import DecoderLayout

logger = logging.getLogger(__name__)

KERNEL_TYPES = (*FORMATS, "f32", "f16", "bf16", "f64")  # f64 is rounded to f32
# GGUF's names of a layer's norms -> the decoder's.
NORM_NAMES = {
    "attn_norm": "attention_norm",
    "attn_q_norm": "query_norm",
    "attn_k_norm": "key_norm",
    "post_attention_norm": "attention_post_norm",
    "ffn_norm": "inner_norm",
    "post_ffw_norm": "inner_post_norm",
    "output_norm": "final_norm",
}

Matrix = tuple[int, str, native.PackedMatrix]  # layer, role, weights


class Loader:
    """Of one checkpoint, for a context of so many tokens.

    Attributes:
        matrices: of each tensor, where the decoder has it.
        vocabulary: the number of token ids, once loaded.
        weight_bytes: that computing a token reads, once loaded.
    """

    def __init__(self, checkpoint: Checkpoint, description: Description, layout: DecoderLayout, context: int) -> None:
        self._checkpoint, self._description, self._context = checkpoint, description, context
        self._layout = layout
        self._weights = native.DecoderWeights(description.sizes.blocks)
        self._hash = zlib.crc32(json.dumps(asdict(description), sort_keys=True).encode())
        self.vocabulary = 0
        self.weight_bytes = 0
        self.matrices: dict[str, list[Matrix]] = {}

    @property
    def fingerprint(self) -> str:
        """Of description and weights."""
        return f"{self._hash:08x}"

    def load(self) -> native.DecoderWeights:
        """Read everything."""
        family = self._checkpoint.family
        others = {self._checkpoint.stored_type(name) for name in self._checkpoint.names} - set(KERNEL_TYPES)
        if others:
            told = ", ".join(sorted(others))
            logger.warning("%s: %s weights become Q8_0 in memory, row by row", self._checkpoint.path, told)
        for name in self._checkpoint.names:
            self._load(name, *self._layout.place(name))
        if not self.vocabulary:
            where = f"{self._checkpoint.path}: the files are not those of its config.json"
            raise InputError(f"{where}: {family.embedding} is missing")
        if self._checkpoint.tied:
            self._weights.set_matrix(0, "head", self._embedding)
        for rope in self._description.ropes:
            cosines, sines = rotary_table(rope, self._context)
            self._weights.add_rotary_table(cosines.reshape(-1), sines.reshape(-1))
        return self._weights

    def _load(self, name: str, layer: int, kind: str, last: str) -> None:
        if kind in NORM_NAMES:
            values = self._vector(name)
            if last == "weight":
                self._weights.set_norm(layer, NORM_NAMES[kind], values + np.float32(self._description.norm_offset))
            else:
                self._weights.set_norm_bias(layer, NORM_NAMES[kind], values)
        elif kind == "token_embd":
            self._embedding = self._matrix(name)
            self._weights.set_embedding(self._embedding)
            self.weight_bytes += self._embedding.bytes if self._checkpoint.tied else 0  # else one row of it is read
            self.vocabulary = self._checkpoint.shape(name)[0]
        elif kind == "position_embd":
            self._weights.set_positions(self._matrix(name))
        elif last == "weight":
            for role, rows in self._layout.roles(name, kind):
                matrix = self._matrix(name, rows)
                self._weights.set_matrix(layer, role, matrix)
                self.matrices.setdefault(name, []).append((layer, role, matrix))
                self.weight_bytes += matrix.bytes
        else:
            values = self._vector(name)
            for role, rows in self._layout.roles(name, kind):
                self._weights.set_bias(layer, role, values[rows.start : rows.stop])

    def _vector(self, name: str) -> np.ndarray:
        data = self._checkpoint.read_bytes(name)
        self._hash = zlib.crc32(data.data, self._hash)
        values = to_fp32(data, self._checkpoint.entry(name).dtype)
        order = self._layout.row_order(name)
        return np.ascontiguousarray(values if order is None else values[order])

    def _matrix(self, name: str, rows: range | None = None) -> native.PackedMatrix:
        checkpoint = self._checkpoint
        count, columns = checkpoint.shape(name)
        rows = range(count) if rows is None else rows
        word = self._weight_type(name, columns)
        matrix = native.PackedMatrix(word, len(rows), columns)
        for start, part in self._parts(name):
            if rows.start == 0:  # once for a tensor, though it may be read for several matrices
                self._hash = zlib.crc32(np.ascontiguousarray(part).data, self._hash)
            first, last = max(start, rows.start), min(start + len(part), rows.stop)
            if first < last:
                chosen = self._converted(name, part[first - start : last - start], word)
                matrix.fill(first - rows.start, np.ascontiguousarray(chosen))
        return matrix

    def _parts(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        order = self._layout.row_order(name)
        if order is None:
            yield from self._checkpoint.read_rows(name)
        else:
            yield 0, self._checkpoint.read_bytes(name).reshape(len(order), -1)[order]

    def _weight_type(self, name: str, columns: int) -> str:
        """What the core computes with: the file's type, or Q8_0 for blocks that it has no kernel for."""
        word = self._checkpoint.stored_type(name)
        if word in KERNEL_TYPES and word != "f64":
            return word
        return "q8_0" if word != "f64" and columns % 32 == 0 else "f32"

    def _converted(self, name: str, part: np.ndarray, word: str) -> np.ndarray:
        """uint8 [rows, row bytes] in the type that the core takes."""
        stored = self._checkpoint.stored_type(name)
        if word == stored:
            return part
        entry = self._checkpoint.entry(name)
        values = to_fp32(np.ascontiguousarray(part).reshape(-1), entry.dtype).reshape(len(part), -1)
        if word == "f32":
            return values.view(np.uint8)
        return pack_rows(values, FORMATS[word], f"{self._checkpoint.path}: {name}", measure=False).blocks
