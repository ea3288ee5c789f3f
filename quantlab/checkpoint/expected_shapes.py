"""Do the tensors fit the configuration? Told from headers alone, without building a model."""

from __future__ import annotations

from collections.abc import Iterator

from quantlab.checkpoint.checkpoint import Checkpoint
from quantlab.checkpoint.gguf_architectures import ROWS
from quantlab.checkpoint.gguf_sizes import Sizes, sizes_of_config
from quantlab.errors import InputError


def check_shapes(checkpoint: Checkpoint) -> None:
    """Compare every tensor with the sizes that the configuration states, and every layer with the others.

    Raises:
        InputError: sizes that are none, or a tensor that is missing or has another shape.
    """
    where = checkpoint.path / "config.json" if checkpoint.path.is_dir() else checkpoint.path
    faults = list(_faults(checkpoint, str(where)))
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise InputError(f"{checkpoint.path}: the files are not those of its config.json: {faults[0]}{more}")


def _faults(checkpoint: Checkpoint, source: str) -> Iterator[str]:
    row = ROWS[checkpoint.family.model_type]
    values = row.config_values(checkpoint.config, source)
    sizes, vocabulary = sizes_of_config(row, values), values.integer("vocab_size")
    layers: dict[int, set[str]] = {layer: set() for layer in range(sizes.blocks)}
    for name in checkpoint.names:
        layer, kind, last = _place(checkpoint, name)
        if layer is not None:
            if layer not in layers:
                yield f"{name} is of layer {layer}, and there are {sizes.blocks}"
                continue
            layers[layer].add(f"{kind}.{last}")
        expected = _expected(kind, last, sizes, vocabulary)
        if expected and checkpoint.shape(name) not in expected:
            yield f"{name} is {list(checkpoint.shape(name))} instead of {list(expected[0])}"
    if checkpoint.names:
        yield from (f"{name} is missing" for name in _missing(checkpoint, layers))


def _place(checkpoint: Checkpoint, name: str) -> tuple[int | None, str, str]:
    """Layer, kind and last part of a tensor's GGUF name, which all families share."""
    stem, _, last = (checkpoint.family.gguf_name(name) or name).rpartition(".")
    parts = stem.split(".")
    return (int(parts[1]), parts[2], last) if parts[0] == "blk" else (None, stem, last)


def _expected(kind: str, last: str, sizes: Sizes, vocabulary: int) -> tuple[tuple[int, ...], ...]:
    """The shapes that are possible; none for what is not known."""
    width, inner = sizes.width, sizes.feed_forward
    queries, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    matrices: dict[str, tuple[tuple[int, int], ...]] = {
        "token_embd": ((vocabulary, width),),
        "output": ((vocabulary, width),),
        "position_embd": ((sizes.context, width),),
        "attn_q": ((queries, width),),
        "attn_k": ((keys, width),),
        "attn_v": ((keys, width),),
        "attn_qkv": ((queries + 2 * keys, width),),
        "attn_output": ((width, queries),),
        "ffn_gate": ((inner, width),),
        "ffn_up": ((inner, width), (2 * inner, width)),  # Phi-3's holds the gate too
        "ffn_down": ((width, inner),),
    }
    if kind in matrices:
        return matrices[kind] if last == "weight" else tuple((rows,) for rows, _ in matrices[kind])
    if kind in ("attn_q_norm", "attn_k_norm"):
        return ((sizes.head_dim,),)
    return ((width,),) if kind.endswith("norm") else ()


def _missing(checkpoint: Checkpoint, layers: dict[int, set[str]]) -> Iterator[str]:
    if checkpoint.family.embedding not in checkpoint.names:
        yield checkpoint.family.embedding
    kinds = set().union(*layers.values())
    for layer, found in layers.items():
        for kind in sorted(kinds - found):
            yield checkpoint.family.name_of_gguf(f"blk.{layer}.{kind}") or f"blk.{layer}.{kind}"
