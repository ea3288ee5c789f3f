"""A sequence's cache in a file, with what it belongs to: a mismatch is a clean miss, never a wrong continuation.

The file: 8 bytes of magic, the length of a JSON header (8 bytes, little-endian), the header, the cache's bytes as the
core exports them. The header names the model's fingerprint, cache and activation types, all tokens, and the SHA-256 of
the bytes.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from quantlab.checkpoint.atomic import atomic_file
from quantlab.errors import InputError

MAGIC = b"QLCACHE2"
MAX_HEADER_BYTES = 1 << 26


def write_cache(path: Path, identity: Mapping[str, Any], tokens: list[int], cache: np.ndarray) -> None:
    """Write a file that is complete or not there; replaces an older one.

    Raises:
        InputError: the folder cannot be written.
    """
    digest = hashlib.sha256(cache.data).hexdigest()
    header = json.dumps({**identity, "tokens": tokens, "bytes": cache.nbytes, "sha256": digest}).encode()
    with atomic_file(path, replace=True) as temporary, temporary.open("wb") as file:
        file.write(MAGIC + struct.pack("<Q", len(header)) + header)
        file.write(cache.data)


def read_cache(path: Path, identity: Mapping[str, Any]) -> tuple[list[int], np.ndarray] | None:
    """Tokens and cache; None where the file is missing, damaged, or of something else."""
    try:
        with path.open("rb") as file:
            start = file.read(16)
            size = path.stat().st_size - 16
            length = struct.unpack("<Q", start[8:])[0] if len(start) == 16 and start[:8] == MAGIC else 0
            if not 0 < length <= min(size, MAX_HEADER_BYTES):
                return None
            header = json.loads(file.read(length))
            tokens = header["tokens"]
            is_ours = all(header.get(key) == value for key, value in identity.items())
            if not is_ours or header["bytes"] != size - length or not all(type(token) is int for token in tokens):
                return None
            cache = np.fromfile(file, np.uint8)
            return (tokens, cache) if hashlib.sha256(cache.data).hexdigest() == header["sha256"] else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, InputError):
        return None
