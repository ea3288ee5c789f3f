"""What a checkpoint holds, from its headers alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from quantlab.checkpoint.reader import open_checkpoint


@dataclass(frozen=True)
class TensorSummary:
    """`shape` is that of the weights ([out, in] for linear ones), `format` a block format or an element type."""

    name: str
    shape: tuple[int, ...]
    format: str
    bytes: int


@dataclass(frozen=True)
class Summary:
    """`bytes` counts tensor data; `bits_per_weight` is that over all parameters."""

    architecture: str
    parameters: int
    bytes: int
    bits_per_weight: float
    tied_head: bool
    tensors: tuple[TensorSummary, ...]


def summarize(model: str | Path) -> Summary:
    """Summarize a folder, GGUF file or hub id.

    Raises:
        InputError: see `open_checkpoint`.
    """
    checkpoint = open_checkpoint(model)
    tensors = []
    for name in checkpoint.names:
        word, nbytes = checkpoint.stored_type(name), checkpoint.stored_bytes(name)
        tensors.append(TensorSummary(name, checkpoint.shape(name), word, nbytes))
    architectures = checkpoint.config.get("architectures")
    named = [a for a in architectures if _is_class_name(a)] if isinstance(architectures, list) else []
    return Summary(
        architecture=named[0] if named else checkpoint.family.model_type,
        parameters=checkpoint.parameters,
        bytes=checkpoint.nbytes,
        bits_per_weight=8 * checkpoint.nbytes / max(1, checkpoint.parameters),
        tied_head=checkpoint.tied,
        tensors=tuple(tensors),
    )


def _is_class_name(name: object) -> bool:
    return isinstance(name, str) and name.isidentifier()
