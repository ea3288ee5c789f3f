"""Read one safetensors file: the header first, checked against the file's size, then single tensors by `pread`.

The format (https://github.com/huggingface/safetensors#format): 8 bytes little-endian header length, a JSON header
{name: {dtype, shape, data_offsets: [begin, end]}}, then the data, without gaps. The library's own reader maps the
file; `pread` keeps the resident memory at one tensor, and needs no torch.
"""

from __future__ import annotations

import math
import os
import reprlib
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from quantlab.checkpoint.json_file import parse_json
from quantlab.checkpoint.positioned import CUT_SHORT, DAMAGED, open_to_read, read_exactly, read_into
from quantlab.checkpoint.tensors import DTYPE_BYTES, TensorEntry, check_name
from quantlab.errors import InputError

MAX_HEADER_BYTES = 100_000_000  # the library's own limit
MAX_DIMENSIONS = 64  # numpy's and torch's


class SafetensorsFile:
    """An open safetensors file: `entries` by name, `read` for the bytes of one of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = open_to_read(path)
        try:
            self.metadata, self.entries, self._offsets = _read_header(self._descriptor, path)
        except BaseException:
            self.close()
            raise

    def read(self, name: str) -> np.ndarray:
        """The bytes of tensor `name`, a fresh uint8 array."""
        return read_exactly(
            self._descriptor, self.entries[name].nbytes, self._offsets[name], self.path, f"tensor {name}"
        )

    def read_part(self, name: str, begin: int, out: np.ndarray) -> None:
        """Fill `out` (uint8) with bytes of tensor `name` from its byte `begin` on."""
        assert begin + out.nbytes <= self.entries[name].nbytes, f"{name}: beyond its end"
        read_into(out, self._descriptor, self._offsets[name] + begin, self.path, f"tensor {name}")

    def close(self) -> None:
        """Close the file; reading afterwards is an error."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        if getattr(self, "_descriptor", -1) >= 0:
            self.close()


def _read_header(descriptor: int, path: Path) -> tuple[dict[str, str], dict[str, TensorEntry], dict[str, int]]:
    """Metadata, entries and absolute data offsets."""
    size = os.fstat(descriptor).st_size
    if size < 8:
        raise InputError(f"{path}: {size} bytes are no safetensors file; download it again")
    (header_bytes,) = struct.unpack("<Q", read_exactly(descriptor, 8, 0, path, "its header").tobytes())
    if header_bytes > min(size - 8, MAX_HEADER_BYTES):
        raise InputError(f"{path}: claims a header of {header_bytes} bytes in a file of {size}; {DAMAGED}")
    header = _parse(read_exactly(descriptor, header_bytes, 8, path, "its header").tobytes(), path)
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError(f"{path}: __metadata__ in its header is no JSON object of texts")
    data_start, data_bytes = 8 + header_bytes, size - 8 - header_bytes
    entries: dict[str, TensorEntry] = {}
    spans: dict[str, tuple[int, int]] = {}
    for name, field in header.items():
        check_name(name, path)
        entries[name], spans[name] = _check_entry(name, field, data_bytes, path)
    _check_cover(spans, data_bytes, path)
    return metadata, entries, {name: data_start + begin for name, (begin, _) in spans.items()}


def _parse(content: bytes, path: Path) -> dict[str, Any]:
    """The header's object. A key that is there twice, which the format forbids, would mean to each reader another."""
    try:
        header = parse_json(content, _unique)
    except _TwiceError as error:
        raise InputError(f"{path}: {error.args[0][:99]!r} is there twice in its header; damaged") from None
    except (ValueError, RecursionError):
        raise InputError(f"{path}: its header is no JSON; not a safetensors file, or damaged") from None
    if not isinstance(header, dict):
        raise InputError(f"{path}: its header is no JSON object; not a safetensors file, or damaged")
    return header


class _TwiceError(Exception):
    """A key is there twice."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _TwiceError(Counter(key for key, _ in pairs).most_common(1)[0][0])
    return found


def _check_entry(name: str, field: Any, data_bytes: int, path: Path) -> tuple[TensorEntry, tuple[int, int]]:
    """The entry and its span within the data. Any: a piece of unchecked JSON."""
    try:
        dtype, shape, (begin, end) = field["dtype"], field["shape"], field["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise InputError(f"{path}: tensor {name}: its header entry lacks dtype, shape or data_offsets") from None
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise InputError(f"{path}: tensor {name}: unknown element type {reprlib.repr(dtype)}")
    numbers = [*shape, begin, end] if isinstance(shape, list) else [None]
    if not all(type(n) is int and n >= 0 for n in numbers):
        raise InputError(f"{path}: tensor {name}: shape or offsets are no non-negative whole numbers")
    if not begin <= end <= data_bytes:
        raise InputError(f"{path}: tensor {name}: its data ends at byte {end} of {data_bytes}; {CUT_SHORT}")
    if not _is_possible(shape):
        raise InputError(f"{path}: tensor {name}: shape {reprlib.repr(shape)} is impossible; damaged")
    entry = TensorEntry(name, dtype, tuple(shape))
    if end - begin != entry.nbytes:
        raise InputError(
            f"{path}: tensor {name}: {end - begin} bytes for {dtype} {list(shape)}, which needs {entry.nbytes}"
        )
    return entry, (begin, end)


def _is_possible(shape: list[int]) -> bool:
    """Whether arithmetic with these sizes stays short, and 64 bits count the steps that a size of 0 hides."""
    if len(shape) > MAX_DIMENSIONS or any(size > 1 << 64 for size in shape):
        return False
    return 0 not in shape or math.prod(filter(None, shape)) < 1 << 60


def _check_cover(spans: dict[str, tuple[int, int]], data_bytes: int, path: Path) -> None:
    """Tensors follow one another and fill the data, as the format demands and the library checks."""
    previous_end, previous_name = 0, ""
    for name, (begin, end) in sorted(spans.items(), key=lambda item: item[1]):
        if begin < previous_end:
            raise InputError(f"{path}: tensors {previous_name} and {name} overlap; the header is damaged")
        if begin > previous_end:
            raise InputError(f"{path}: tensor {name}: a gap of {begin - previous_end} bytes before it; damaged")
        previous_end, previous_name = end, name
    if previous_end < data_bytes:
        raise InputError(f"{path}: {data_bytes - previous_end} bytes at its end belong to no tensor; damaged")
