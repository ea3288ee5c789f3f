"""The checksums that quantlab's writers record, read again."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor

from quantlab.checkpoint.checkpoint import Checkpoint
from quantlab.checkpoint.folder_writer import CHECKSUM_FILE
from quantlab.checkpoint.gguf_checkpoint import GgufCheckpoint
from quantlab.checkpoint.gguf_writer import CHECKSUMS
from quantlab.checkpoint.json_file import read_json
from quantlab.checkpoint.writer import CHECKSUM_DIGITS, checksum
from quantlab.errors import InputError


def recorded_checksums(checkpoint: Checkpoint) -> dict[str, str]:
    """Checksums by stored name (`Checkpoint.stored_names`); none where no writer of ours recorded them.

    Raises:
        InputError: a record that cannot be read, or does not fit the tensors.
    """
    if isinstance(checkpoint, GgufCheckpoint):
        return _of_gguf(checkpoint)
    file = checkpoint.path / CHECKSUM_FILE
    recorded = read_json(file) if file.is_file() else {}
    if unknown := sorted(set(recorded) - set(checkpoint.stored_names)):
        raise InputError(f"{file}: records {unknown[0]}, which is in no file; one is missing, or the record is old")
    return {name: str(value) for name, value in recorded.items()}


def stored_checksum(checkpoint: Checkpoint, stored_name: str) -> str:
    """The checksum of a tensor's bytes as they lie in the file."""
    return checksum(checkpoint.read_stored(stored_name))


def _of_gguf(checkpoint: GgufCheckpoint) -> dict[str, str]:
    digits, names = checkpoint.metadata.get(CHECKSUMS), checkpoint.stored_names
    if digits is None:
        return {}
    if not isinstance(digits, str) or len(digits) != CHECKSUM_DIGITS * len(names):
        raise InputError(f"{checkpoint.path}: metadata {CHECKSUMS!r} does not fit its {len(names)} tensors; damaged")
    starts = range(0, len(digits), CHECKSUM_DIGITS)
    return {name: digits[i : i + CHECKSUM_DIGITS] for name, i in zip(names, starts, strict=True)}


HASHING_THREADS = 4  # each holds one tensor


def model_digest(checkpoint: Checkpoint) -> str:
    """A hash of all weights and of the configuration: what was measured on one model is of use to no other."""

    def digest(name: str) -> bytes:
        entry = checkpoint.entry(name)
        hasher = hashlib.sha256(f"{name} {entry.dtype} {entry.shape}\n".encode())
        hasher.update(checkpoint.read_bytes(name).data)
        return hasher.digest()

    config = {key: value for key, value in checkpoint.config.items() if key not in _PASSING_KEYS}
    whole = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    with ThreadPoolExecutor(HASHING_THREADS) as pool:  # reading and hashing leave Python's lock alone
        for one in pool.map(digest, sorted(checkpoint.names)):
            whole.update(one)
    return whole.hexdigest()[:CHECKSUM_DIGITS]


_PASSING_KEYS = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache")
