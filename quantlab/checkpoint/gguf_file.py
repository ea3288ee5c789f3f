"""Read one GGUF file: metadata and tensor list first, checked against the file's size, then tensors by `pread`.

The format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), all little-endian: magic, version, number of
tensors, number of metadata entries; the entries (key, value type, value); the tensors (name, dimensions with the
fastest first, element type, offset); padding to `general.alignment`; the data, every tensor at an aligned offset. The
`gguf` package's reader maps the file and believes its header; here a number is checked before anything is allocated.
"""

from __future__ import annotations

import math
import os
import reprlib
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quantlab.checkpoint.gguf_types import (
    ARRAY,
    BOOL,
    DEFAULT_ALIGNMENT,
    MAGIC,
    MAX_DIMENSIONS,
    SCALARS,
    STRING,
    ElementType,
    element_type,
)
from quantlab.checkpoint.positioned import CUT_SHORT, DAMAGED, open_to_read, read_exactly, read_into
from quantlab.checkpoint.tensors import check_name
from quantlab.errors import InputError

READ_AHEAD = 1 << 20
MAX_HEADER_BYTES = 100_000_000  # as in safetensors; a vocabulary of 2**18 tokens with its merges takes 15 MB
MAX_COUNT = 1 << 18  # of tensors and of metadata entries; the field's files have thousands and dozens
MAX_NAME_BYTES = 65535  # the format's limit on keys


@dataclass(frozen=True)
class GgufEntry:
    """One tensor. `shape` is in numpy's order (rows first), `offset` is absolute."""

    name: str
    type: ElementType
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return math.prod(self.shape) // self.type.block_size * self.type.block_bytes


class GgufFile:
    """An open GGUF file: `metadata` by key, `entries` by name, `read` for the bytes of one tensor.

    Metadata values are bool, int, float and str; arrays of text are lists, others numpy arrays.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = open_to_read(path)
        try:
            header = _Header(self._descriptor, path)
            self.metadata, self.entries = header.metadata, header.entries
        except BaseException:
            self.close()
            raise

    def read(self, name: str) -> np.ndarray:
        """The bytes of tensor `name`, a fresh uint8 array."""
        entry = self.entries[name]
        return read_exactly(self._descriptor, entry.nbytes, entry.offset, self.path, f"tensor {name}")

    def read_part(self, name: str, begin: int, out: np.ndarray) -> None:
        """Fill `out` (uint8) with bytes of tensor `name` from its byte `begin` on."""
        assert begin + out.nbytes <= self.entries[name].nbytes, f"{name}: beyond its end"
        read_into(out, self._descriptor, self.entries[name].offset + begin, self.path, f"tensor {name}")

    def close(self) -> None:
        """Close the file; reading afterwards is an error."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        if getattr(self, "_descriptor", -1) >= 0:
            self.close()


class _Header:
    """A cursor over the file's beginning, which it reads on demand and no further than the file goes."""

    def __init__(self, descriptor: int, path: Path) -> None:
        self._descriptor, self._path = descriptor, path
        self._size = os.fstat(descriptor).st_size
        self._buffer, self._start, self._at = b"", 0, 0
        self.metadata: dict[str, Any] = {}  # Any: values of many types
        self.entries: dict[str, GgufEntry] = {}
        tensors, entries = self._read_counts()
        for _ in range(entries):
            self._read_metadata()
        self._read_tensors(tensors)

    def _fault(self, problem: str) -> InputError:
        return InputError(f"{self._path}: {problem}")

    def _take(self, count: int, what: str) -> bytes:
        """The next `count` bytes."""
        begin = self._at - self._start
        if begin + count > len(self._buffer):
            self._read_ahead(count, what)
            begin = 0
        self._at += count
        return self._buffer[begin : begin + count]

    def _read_ahead(self, count: int, what: str) -> None:
        """Fill the buffer from here on, with `count` bytes at least."""
        self._check_room(count, what)
        ahead = min(max(count, READ_AHEAD), self._size - self._at)
        data = read_exactly(self._descriptor, ahead, self._at, self._path, "its header")
        self._buffer, self._start = data.tobytes(), self._at

    def _check_room(self, count: int, what: str) -> None:
        left = self._size - self._at
        if count > left:
            raise self._fault(f"{what} claims {count} bytes where {left} are left; {DAMAGED}")
        if self._at + count > MAX_HEADER_BYTES:
            raise self._fault(
                f"{what} goes on beyond {MAX_HEADER_BYTES} bytes of header, which no model needs; damaged"
            )

    def _number(self, word: str, what: str) -> int:
        return int(struct.unpack(word, self._take(struct.calcsize(word), what))[0])

    def _text(self, what: str, limit: int | None = None) -> str:
        length = self._number("<Q", what)
        if limit is not None and length > limit:
            raise self._fault(f"{what} is {length} bytes long; damaged")
        try:
            return self._take(length, what).decode()
        except UnicodeDecodeError:
            raise self._no_text(what) from None

    def _no_text(self, what: str) -> InputError:
        return self._fault(f"{what} is no UTF-8 text; damaged")

    def _read_counts(self) -> tuple[int, int]:
        if self._size < 24:
            raise self._fault(f"{self._size} bytes are no GGUF file; download it again")
        magic = bytes(self._take(4, "the magic"))
        if magic != MAGIC:
            raise self._fault(f"begins with {magic!r} instead of {MAGIC!r}; not a GGUF file")
        version = self._number("<I", "the version")
        if version not in (2, 3):
            reason = "is big-endian" if version in (2 << 24, 3 << 24) else f"has GGUF version {version}"
            raise self._fault(f"{reason}, and little-endian versions 2 and 3 are read; convert the model again")
        tensors, entries = self._number("<Q", "the tensor count"), self._number("<Q", "the metadata count")
        # The least that each takes: a metadata entry key length, type, one byte; a tensor name length, dimensions,
        # one of them, type, offset.
        for count, least, what in ((entries, 13, "metadata entries"), (tensors, 32, "tensors")):
            if count > min((self._size - self._at) // least, MAX_COUNT):
                raise self._fault(f"claims {count} {what} in {self._size} bytes; {DAMAGED}")
        return tensors, entries

    def _read_metadata(self) -> None:
        key = self._text("a metadata key", MAX_NAME_BYTES)
        if key in self.metadata:
            raise self._fault(f"metadata key {key!r} is there twice; damaged")
        kind = self._number("<I", f"metadata {key!r}")
        if kind == ARRAY:
            self.metadata[key] = self._array(f"metadata {key!r}")
        else:
            self.metadata[key] = self._value(kind, f"metadata {key!r}")

    def _value(self, kind: int, what: str) -> bool | int | float | str:
        if kind == STRING:
            return self._text(what)
        return self._scalars(kind, 1, what)[0].item()

    def _scalars(self, kind: int, count: int, what: str) -> np.ndarray:
        if kind not in SCALARS:
            raise self._fault(f"{what} has the unknown value type {kind}; damaged")
        dtype = np.dtype(SCALARS[kind])
        raw = self._take(count * dtype.itemsize, what)
        if kind == BOOL and (np.frombuffer(raw, np.uint8) > 1).any():
            raise self._fault(f"{what} is neither true nor false; damaged")
        return np.frombuffer(raw, dtype=dtype)

    def _array(self, what: str) -> list[str] | np.ndarray:
        kind, count = self._number("<I", what), self._number("<Q", what)
        if kind == ARRAY:
            raise self._fault(f"{what} is an array of arrays, which no model has; damaged")
        if kind != STRING:
            return self._scalars(kind, count, what).copy()
        self._check_room(8 * count, what)  # each text has a length
        return self._texts(count, what)

    def _texts(self, count: int, what: str) -> list[str]:
        texts: list[str] = []
        try:
            while len(texts) < count:
                self._take_buffered(texts, count)
                if len(texts) < count:
                    texts.append(self._text(what))  # this one goes on beyond the buffer, or beyond the file
        except UnicodeDecodeError:
            raise self._no_text(what) from None
        return texts

    def _take_buffered(self, texts: list[str], count: int) -> None:
        """Append the texts that lie in the buffer as a whole, until there are `count`. A vocabulary with its merges has
        400 000: this loop is most of the time that opening a file takes.
        """
        buffer, begin, end = self._buffer, self._at - self._start, len(self._buffer)
        append, length_at = texts.append, struct.Struct("<Q").unpack_from
        for _ in range(count - len(texts)):
            start = begin + 8
            if start > end:
                break
            stop = start + length_at(buffer, begin)[0]
            if stop > end:
                break
            append(buffer[start:stop].decode())
            begin = stop
        self._at = self._start + begin

    def _read_tensors(self, count: int) -> None:
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1) or alignment > 1 << 20:
            raise self._fault(f"general.alignment is {reprlib.repr(alignment)}, which is no power of two; damaged")
        found: list[tuple[int, str, ElementType, tuple[int, ...]]] = []
        names = set()
        for _ in range(count):
            name = self._text("a tensor name", MAX_NAME_BYTES)
            check_name(name, self._path)
            if name in names:
                raise self._fault(f"tensor {name} is there twice; damaged")
            names.add(name)
            element, shape = self._read_layout(name)
            offset = self._number("<Q", f"tensor {name}")
            if offset % alignment:
                raise self._fault(
                    f"tensor {name}: offset {offset} is no multiple of the alignment, {alignment}; damaged"
                )
            found.append((offset, name, element, shape))
        data_start = -(-self._at // alignment) * alignment
        self.entries = {
            name: GgufEntry(name, element, shape, data_start + offset) for offset, name, element, shape in found
        }
        self._check_cover(data_start, alignment)

    def _read_layout(self, name: str) -> tuple[ElementType, tuple[int, ...]]:
        dimensions = self._number("<I", f"tensor {name}")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise self._fault(f"tensor {name}: has {dimensions} dimensions; 1 to {MAX_DIMENSIONS} are possible")
        shape = tuple(self._number("<Q", f"tensor {name}") for _ in range(dimensions))[::-1]
        if not all(0 < size < 1 << 63 for size in shape):
            raise self._fault(f"tensor {name}: shape {list(shape)} is impossible; damaged")
        number = self._number("<I", f"tensor {name}")
        element = element_type(number)
        if element is None:
            raise self._fault(f"tensor {name}: unknown element type {number}; damaged, or newer than this program")
        if shape[-1] % element.block_size:
            raise self._fault(f"tensor {name}: rows of {shape[-1]} are no whole {element.word} blocks; damaged")
        return element, shape

    def _check_cover(self, data_start: int, alignment: int) -> None:
        """Tensors follow one another, padded to the alignment, and fill the file, as ggml's own reader demands."""
        end, previous = data_start, ""
        for entry in sorted(self.entries.values(), key=lambda entry: entry.offset):
            where = f"tensor {entry.name}"
            if entry.offset < end:
                raise self._fault(f"tensors {previous} and {entry.name} overlap; the header is damaged")
            if entry.offset > end:
                raise self._fault(f"{where}: a gap of {entry.offset - end} bytes before it; damaged")
            if entry.offset + entry.nbytes > self._size:
                last = entry.offset + entry.nbytes
                raise self._fault(f"{where}: its data ends at byte {last} of {self._size}; {CUT_SHORT}")
            end, previous = -(-(entry.offset + entry.nbytes) // alignment) * alignment, entry.name
        if self._size > end:
            raise self._fault(f"{self._size - end} bytes at its end belong to no tensor; damaged")
