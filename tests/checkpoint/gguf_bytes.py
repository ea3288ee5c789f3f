"""GGUF files made piece by piece, right ones and wrong ones, as https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
describes them; nothing of quantlab is used.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64, FLOAT64 = range(13)
WORDS = {UINT8: "B", INT8: "b", UINT16: "H", INT16: "h", UINT32: "I", INT32: "i", FLOAT32: "f", BOOL: "B",
         UINT64: "Q", INT64: "q", FLOAT64: "d"}  # fmt: skip
F32, F16, Q4_1, Q8_0, I8 = 0, 1, 3, 8, 24


def text(value: str | bytes, length: int | None = None) -> bytes:
    """A string with its length, or with a length that is not its own."""
    content = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(content) if length is None else length) + content


def entry(key: str | bytes, kind: int, body: bytes) -> bytes:
    """A metadata entry."""
    return text(key) + struct.pack("<I", kind) + body


def number(key: str, kind: int, value: float) -> bytes:
    """A metadata entry of a number."""
    return entry(key, kind, struct.pack("<" + WORDS[kind], value))


def array(key: str, kind: int, count: int, body: bytes) -> bytes:
    """A metadata entry of an array that says that it has `count` items."""
    return entry(key, ARRAY, struct.pack("<IQ", kind, count) + body)


def tensor(
    name: str | bytes, sizes: Sequence[int], kind: int = F32, offset: int = 0, dimensions: int | None = None
) -> bytes:
    """An item of the tensor list; sizes have the fastest first."""
    count = len(sizes) if dimensions is None else dimensions
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", count, *sizes, kind, offset)


def gguf_file(
    entries: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    entry_count: int | None = None,
    tensor_count: int | None = None,
    alignment: int = 32,
) -> bytes:
    """A whole file: header, padding, data."""
    entry_count = len(entries) if entry_count is None else entry_count
    tensor_count = len(tensors) if tensor_count is None else tensor_count
    head = magic + struct.pack("<IQQ", version, tensor_count, entry_count) + b"".join(entries) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data
