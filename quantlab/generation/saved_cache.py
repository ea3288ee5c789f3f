"""A sequence's cache in a file, with what it belongs to: a mismatch is a clean miss, never a wrong continuation.

The file: 8 bytes of magic, the length of a JSON header (8 bytes, little-endian), the header, the cache's bytes as the
core exports them. The header names the model's fingerprint, cache and activation types, all tokens, and the SHA-256 of
the bytes; of a part of a sequence (prompt_cache.py) also what the part is, and its own tokens only.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from quantlab.checkpoint.atomic import atomic_file
from quantlab.errors import InputError

MAGIC = b"QLCACHE2"
MAX_HEADER_BYTES = 1 << 26
MAX_TOKEN = (1 << 31) - 1
_START = 16  # bytes of magic and length
# What reading a file of any other content may raise.
_FAULTS = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, InputError)


def write_cache(path: Path, identity: Mapping[str, Any], tokens: list[int], cache: np.ndarray) -> None:
    """Write a file that is complete or not there; replaces an older one.

    Raises:
        InputError: the folder cannot be written.
    """
    with atomic_file(path, replace=True) as temporary, temporary.open("wb") as file:
        write_to(file, identity, tokens, cache)


def write_to(file: BinaryIO, identity: Mapping[str, Any], tokens: list[int], cache: np.ndarray) -> None:
    """All of the file's bytes."""
    digest = hashlib.sha256(cache.data).hexdigest()
    header = json.dumps({**identity, "tokens": tokens, "bytes": cache.nbytes, "sha256": digest}).encode()
    file.write(MAGIC + struct.pack("<Q", len(header)) + header)
    file.write(cache.data)


def read_cache(path: Path, identity: Mapping[str, Any]) -> tuple[list[int], np.ndarray] | None:
    """Tokens and cache; None where the file is missing, damaged, or of something else."""
    try:
        with path.open("rb") as file:
            header = _read_header(file, identity)
            cache = np.fromfile(file, np.uint8)
            whole = hashlib.sha256(cache.data).hexdigest() == header["sha256"]
            return (header["tokens"], cache) if whole else None
    except _FAULTS:
        return None


def read_tokens(path: Path, identity: Mapping[str, Any]) -> list[int] | None:
    """Its tokens alone, without a look at the cache's bytes; None as `read_cache`."""
    try:
        with path.open("rb") as file:
            tokens: list[int] = _read_header(file, identity)["tokens"]
            return tokens
    except _FAULTS:
        return None


def _read_header(file: BinaryIO, identity: Mapping[str, Any]) -> dict[str, Any]:
    """The header of a file of that identity, which has as many bytes as it says; the file stands behind it.

    Raises:
        ValueError: it is another file. What else a header of any content may give, see `_FAULTS`.
    """
    start = file.read(_START)
    size = os.fstat(file.fileno()).st_size - _START
    length = struct.unpack("<Q", start[8:])[0] if len(start) == _START and start[:8] == MAGIC else 0
    if not 0 < length <= min(size, MAX_HEADER_BYTES):
        raise ValueError("no saved cache")
    header: dict[str, Any] = json.loads(file.read(length))
    is_ours = all(header.get(key) == value for key, value in identity.items())
    if not is_ours or header["bytes"] != size - length:
        raise ValueError("another cache")
    if not all(type(token) is int and 0 <= token <= MAX_TOKEN for token in header["tokens"]):
        raise ValueError("no tokens")
    return header
