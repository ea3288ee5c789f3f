"""How far each stored tensor of a model is from another's, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quantlab import native
from quantlab.checkpoint import Checkpoint, open_checkpoint
from quantlab.checkpoint.tensor_names import layer_and_kind
from quantlab.checkpoint.tensors import FLOAT_DTYPES, to_fp32
from quantlab.errors import InputError


@dataclass(frozen=True)
class TensorError:
    """`relative_error` is the Frobenius norm of the difference over that of the reference's weights; `layer` is None
    outside the layers, `kind` is the name without layer and `.weight`; `format` is what the other model's file keeps it
    in.
    """

    name: str
    layer: int | None
    kind: str
    format: str
    relative_error: float


def tensor_errors(reference: str | Path, model: str | Path) -> list[TensorError]:
    """The errors of all matrices that both models store, in the reference's order.

    Raises:
        InputError: a model cannot be read, or a tensor has another shape.
    """
    original, other = open_checkpoint(reference), open_checkpoint(model)
    known, found = set(other.names), []
    for name in original.names:
        if name not in known or len(original.shape(name)) != 2:
            continue
        if original.shape(name) != other.shape(name):
            shapes = f"{list(original.shape(name))} and {list(other.shape(name))}"
            raise InputError(f"{reference} and {model}: tensor {name} has shapes {shapes}; they are different models")
        layer, kind = layer_and_kind(name)
        found.append(TensorError(name, layer, kind, other.stored_type(name), _relative_error(original, other, name)))
    return found


def _relative_error(original: Checkpoint, other: Checkpoint, name: str) -> float:
    difference = norm = 0.0
    rows = zip(_rows(original, name), _rows(other, name), strict=True)
    for ours, theirs in rows:
        difference += float(np.square(ours - theirs, dtype=np.float64).sum())
        norm += float(np.square(ours, dtype=np.float64).sum())
    return (difference / norm) ** 0.5 if norm else 0.0


def _rows(checkpoint: Checkpoint, name: str) -> Iterator[np.ndarray]:
    """The weights row by row in fp32, unpacked some rows at a time."""
    format, entry = checkpoint.format(name), checkpoint.entry(name)
    for _, part in checkpoint.read_rows(name):
        if format is not None:
            yield from native.dequantize(format.name, part)
        elif entry.dtype in FLOAT_DTYPES:
            yield from to_fp32(np.ascontiguousarray(part).reshape(-1), entry.dtype).reshape(len(part), -1)
        else:
            raise InputError(f"{checkpoint.path}: tensor {name} holds {entry.dtype}, no weights")
