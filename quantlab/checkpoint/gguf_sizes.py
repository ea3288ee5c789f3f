"""The sizes that every architecture states: from config.json or from GGUF metadata, and to either.

A file's header is believed as far as its tensors bear it out, so that a lie costs nobody any memory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantlab.checkpoint.checked_values import CheckedValues, shortest
from quantlab.checkpoint.gguf_architectures import SIZE_KEYS, ModelRow
from quantlab.errors import InputError

Shapes = Mapping[str, tuple[int, ...]]

MAX_BLOCKS = 512  # llama.cpp's LLAMA_MAX_LAYERS
MAX_HEAD_DIM = 1 << 16
_LAYER = re.compile(r"blk\.(\d{1,6})\.")


@dataclass(frozen=True)
class Sizes:
    """What every architecture states; `width` is the hidden size."""

    context: int
    width: int
    blocks: int
    feed_forward: int
    heads: int
    kv_heads: int
    head_dim: int
    epsilon: float


def sizes_of_config(row: ModelRow, config: CheckedValues) -> Sizes:
    """The sizes that config.json states.

    Raises:
        InputError: one is missing where the type has no default, is no size, or does not go with the others.
    """
    width, heads = config.integer(row.name("width")), config.integer(row.name("heads"))
    inner, groups = row.name("feed_forward"), row.name("kv_heads")
    is_usual = row.model_type == "gpt2" and config.get(inner) is None
    sizes = Sizes(
        context=config.integer(row.name("context")),
        width=width,
        blocks=config.integer(row.name("blocks"), most=MAX_BLOCKS),
        feed_forward=4 * width if is_usual else config.integer(inner),
        heads=heads,
        kv_heads=config.integer(groups) if row.grouped and config.get(groups) is not None else heads,
        head_dim=width // heads if config.get("head_dim") is None else config.integer("head_dim"),
        epsilon=config.number(row.name("epsilon")),
    )
    _check(sizes, row, config, row.name("heads"), groups, "head_dim")
    return sizes


def sizes_of_gguf(row: ModelRow, values: CheckedValues, shapes: Shapes) -> Sizes:
    """The sizes that metadata (below the architecture's name) states and the tensors bear out.

    Raises:
        InputError: one is missing, is no size, or does not go with the others or with the tensors.
    """
    width, heads = values.integer(row.key("width")), values.integer(row.key("heads"))
    head_dim = values.integer("attention.key_length", width // heads, least=0)
    for key in ("attention.value_length", "attention.key_length_swa", "attention.value_length_swa"):
        if values.integer(key, head_dim, least=0) != head_dim:
            raise values.refusal(key, f"{head_dim}, as keys have")
    sizes = Sizes(
        context=values.integer(row.key("context")),
        width=width,
        blocks=values.integer(row.key("blocks"), most=MAX_BLOCKS),
        feed_forward=values.integer(row.key("feed_forward")),
        heads=heads,
        kv_heads=values.integer(row.key("kv_heads"), heads),
        head_dim=head_dim,
        epsilon=shortest(values.number(row.key("epsilon"))),
    )
    _check(sizes, row, values, row.key("heads"), row.key("kv_heads"), "attention.key_length")
    _check_blocks(sizes, values, shapes)
    _check_shapes(sizes, row, values, shapes)
    return sizes


def gguf_of_sizes(sizes: Sizes, row: ModelRow) -> dict[str, Any]:
    """Metadata, keys without the architecture: those that llama.cpp's converter writes."""
    kept = [size for size in SIZE_KEYS if row.grouped or size != "kv_heads"]
    metadata: dict[str, Any] = {row.key(size): getattr(sizes, size) for size in kept}
    if row.free_heads:
        metadata |= {"attention.key_length": sizes.head_dim, "attention.value_length": sizes.head_dim}
    return metadata


def config_of_sizes(sizes: Sizes, row: ModelRow) -> dict[str, Any]:
    """config.json's keys."""
    kept = [size for size in SIZE_KEYS if row.grouped or size != "kv_heads"]
    config: dict[str, Any] = {row.name(size): getattr(sizes, size) for size in kept}
    if row.model_type == "gpt2" and sizes.feed_forward == 4 * sizes.width:
        config[row.name("feed_forward")] = None
    return config | ({"head_dim": sizes.head_dim} if row.free_heads else {})


def _check(sizes: Sizes, row: ModelRow, values: CheckedValues, heads: str, groups: str, head_dim: str) -> None:
    turns_all = row.rope is not None and not row.rope.partial
    if not 1 <= sizes.head_dim <= MAX_HEAD_DIM or (turns_all and sizes.head_dim % 2):
        raise values.refusal(heads, f"a number of heads of an even width, {MAX_HEAD_DIM} at most")
    if row.whole_heads and sizes.width % sizes.heads:
        raise values.refusal(heads, f"a divisor of the hidden size, {sizes.width}")
    if sizes.heads % sizes.kv_heads or (not row.grouped and sizes.heads != sizes.kv_heads):
        raise values.refusal(groups, f"a divisor of {sizes.heads} heads that a {row.model_type} model can have")
    if not row.free_heads and sizes.head_dim * sizes.heads != sizes.width:
        raise values.refusal(head_dim, f"{sizes.width // sizes.heads}; llama.cpp's {row.architecture} has no other")


def _check_blocks(sizes: Sizes, values: CheckedValues, shapes: Shapes) -> None:
    found = {int(layer[1]) for layer in map(_LAYER.match, shapes) if layer is not None}
    if len(found) != sizes.blocks or max(found) != sizes.blocks - 1:
        raise values.refusal("block_count", f"{len(found)}, the number of layers that the file has tensors of")


def _check_shapes(sizes: Sizes, row: ModelRow, values: CheckedValues, shapes: Shapes) -> None:
    """The first layer's and the embeddings' tensors must be as large as the sizes say."""
    inside = sizes.heads * sizes.head_dim
    rows = max((1, *shapes.get("token_embd.weight", ())[:1]))
    expected = {
        "token_embd.weight": (rows, sizes.width),
        "blk.0.attn_output.weight": (sizes.width, inside),
        "blk.0.ffn_down.weight": (sizes.width, sizes.feed_forward),
    }
    if row.rope is None:
        expected["position_embd.weight"] = (sizes.context, sizes.width)
    if "blk.0.attn_qkv.weight" in shapes:
        expected["blk.0.attn_qkv.weight"] = (inside + 2 * sizes.kv_heads * sizes.head_dim, sizes.width)
    else:
        expected["blk.0.attn_k.weight"] = (sizes.kv_heads * sizes.head_dim, sizes.width)
    for name, shape in expected.items():
        if name not in shapes:
            raise InputError(f"{values.source}: holds no tensor {name}; {values.way_out}")
        if tuple(shapes[name]) != shape:
            stated = f"{list(shape)}, as the metadata says"
            raise InputError(f"{values.source}: tensor {name} is {list(shapes[name])} instead of {stated}")
