"""Serialize a GGUF header: metadata and tensor list; `gguf_file` reads what this writes."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from quantlab.checkpoint.gguf_types import (
    ARRAY,
    BOOL,
    DEFAULT_ALIGNMENT,
    FLOAT32,
    INT32,
    MAGIC,
    SCALARS,
    STRING,
    UINT32,
    VERSION,
)

INT64, UINT64 = 11, 10


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be. `shape` is in numpy's order; `offset` counts from the data's start."""

    name: str
    type_number: int
    shape: tuple[int, ...]
    nbytes: int
    offset: int = 0


@dataclass(frozen=True)
class Header:
    """A serialized header, padded: the data starts at its end. `value_offsets` tells where each metadata value's bytes
    lie (of text and arrays: behind their lengths).
    """

    content: bytes
    value_offsets: dict[str, int]


def serialize_header(metadata: Mapping[str, Any], tensors: Sequence[PlannedTensor]) -> Header:
    """The header of a file with these tensors. Any: bool, int, float, str, lists and numpy arrays.

    A Python number is written as the field's files have it: bool, uint32 (int32 if negative, 64 bits if too large), or
    float32; arrays of numbers keep numpy's type.
    """
    out = bytearray(MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(metadata)))
    offsets = {}
    for key, value in metadata.items():
        out += _text(key)
        head, body = _value(value)
        offsets[key] = len(out) + len(head)
        out += head + body
    for tensor in tensors:
        out += _text(tensor.name) + struct.pack("<I", len(tensor.shape))
        out += struct.pack(f"<{len(tensor.shape)}Q", *tensor.shape[::-1])
        out += struct.pack("<IQ", tensor.type_number, tensor.offset)
    out += bytes(-len(out) % DEFAULT_ALIGNMENT)
    return Header(bytes(out), offsets)


def _text(text: str) -> bytes:
    data = _utf8(text)
    return struct.pack("<Q", len(data)) + data


def _utf8(text: str) -> bytes:
    """A model's name may be that of a folder whose bytes are no UTF-8; question marks stand for them."""
    return text.encode("utf-8", "replace")


def _value(value: Any) -> tuple[bytes, bytes]:
    """Type and length, then the value."""
    if isinstance(value, str):
        data = _utf8(value)
        return struct.pack("<IQ", STRING, len(data)), data
    if isinstance(value, (list, tuple, np.ndarray)):
        return _array(value)
    kind = _kind_of_number(value)
    return struct.pack("<I", kind), np.array(value, dtype=SCALARS[kind]).tobytes()


def _kind_of_number(value: bool | int | float) -> int:
    if isinstance(value, bool):
        return BOOL
    if isinstance(value, float):
        return FLOAT32
    if value < 0:
        return INT32 if value >= -(1 << 31) else INT64
    return UINT32 if value < 1 << 32 else UINT64


def _array(values: list[Any] | tuple[Any, ...] | np.ndarray) -> tuple[bytes, bytes]:
    if isinstance(values, np.ndarray):
        kind = next(number for number, word in SCALARS.items() if np.dtype(word) == values.dtype)
        body = values.tobytes()
    elif all(isinstance(value, str) for value in values):
        kind, body = STRING, b"".join(_text(value) for value in values)
    else:
        kinds = {_kind_of_number(value) for value in values}
        kind = kinds.pop() if len(kinds) == 1 else INT32
        kind = INT32 if kind == UINT32 else kind  # as the field's files have their arrays
        body = np.array(values, dtype=SCALARS[kind]).tobytes()
    return struct.pack("<IIQ", ARRAY, kind, len(values)), body
