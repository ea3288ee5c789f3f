"""Where the native decoder has a checkpoint's tensors: in which layer and matrices, in which order of rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from quantlab.checkpoint import Checkpoint
from quantlab.checkpoint.gguf_architectures import head_counts
from quantlab.checkpoint.gguf_sizes import Sizes
from quantlab.errors import InputError

# GGUF's names of a layer's tensors -> the decoder's; two or three where rows of several lie in one tensor.
MATRICES = {
    "attn_q": ("query",),
    "attn_k": ("key",),
    "attn_v": ("value",),
    "attn_qkv": ("query", "key", "value"),
    "attn_output": ("output",),
    "ffn_gate": ("gate",),
    "ffn_up": ("up",),
    "ffn_down": ("down",),
    "output": ("head",),
}


class Place(NamedTuple):
    """`kind` is GGUF's name of the tensor without its layer, `part` the last word of its name: weight or bias."""

    layer: int
    kind: str
    part: str


class DecoderLayout:
    """Of one checkpoint."""

    def __init__(self, checkpoint: Checkpoint, sizes: Sizes) -> None:
        self._checkpoint, self._sizes = checkpoint, sizes
        self._heads = head_counts(checkpoint.config, str(checkpoint.path))

    def place(self, name: str) -> Place:
        """What tensor `name` is.

        Raises:
            InputError: it belongs to a layer that the configuration does not have.
        """
        stem, _, part = (self._checkpoint.family.gguf_name(name) or "").rpartition(".")
        parts = stem.split(".")
        layer, kind = (int(parts[1]), parts[2]) if parts[0] == "blk" else (0, stem)
        if layer >= self._sizes.blocks:
            raise InputError(f"{self._checkpoint.path}: tensor {name}: the configuration has no such layer")
        return Place(layer, kind, part)

    def roles(self, name: str, kind: str) -> Iterator[tuple[str, range]]:
        """The decoder's matrices in a tensor, and their rows of it, in `row_order`.

        Raises:
            InputError: it has not the rows of all of them.
        """
        rows = self._checkpoint.shape(name)[0]
        queries, keys = self._sizes.heads * self._sizes.head_dim, self._sizes.kv_heads * self._sizes.head_dim
        counts: tuple[int, ...] = (rows,)
        roles = MATRICES[kind]
        if kind == "attn_qkv":
            counts = (queries, keys, keys)
        elif kind == "ffn_up" and rows == 2 * self._sizes.feed_forward:
            roles, counts = ("gate", "up"), (self._sizes.feed_forward, self._sizes.feed_forward)
        if sum(counts) != rows:
            raise InputError(f"{self._checkpoint.path}: tensor {name}: {rows} rows instead of {sum(counts)}")
        start = 0
        for role, count in zip(roles, counts, strict=True):
            yield role, range(start, start + count)
            start += count

    def row_order(self, name: str) -> np.ndarray | None:
        """NeoX's queries, keys and values come out of their interleaving; Llama's rows stay as they are."""
        if self._checkpoint.family.model_type != "gpt_neox":
            return None
        return self._checkpoint.family.gguf_rows(name, self._checkpoint.shape(name)[0], self._heads)
