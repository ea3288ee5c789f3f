"""What fusing a block-sum adapter replaced, kept beside the adapter, and put back byte for byte.

Subtracting the update again would not do: fp16 has rounded the sum. The file holds each weight's minima as they were,
2 bytes a block, under the fused model's digest, so that no other model gets them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from quantlab.adapters.reading import check_folder
from quantlab.checkpoint.atomic import atomic_file
from quantlab.checkpoint.checkpoint import Checkpoint
from quantlab.checkpoint.checksums import model_digest
from quantlab.checkpoint.export import packed_config
from quantlab.checkpoint.safetensors_file import SafetensorsFile
from quantlab.checkpoint.writer import open_writer
from quantlab.errors import InputError
from quantlab.native import adapters as native_adapters


def undo_file(adapter: Path, digest: str) -> Path:
    """Where the minima that a fused model has replaced are kept."""
    return adapter / f"replaced-minimums-{digest}.safetensors"


def check_can_keep(adapter: Path) -> None:
    """Refuse before any work to fuse what could not be undone.

    Raises:
        InputError: the adapter's folder cannot be written.
    """
    if not os.access(adapter, os.W_OK):
        raise InputError(f"{adapter}: cannot be written, and the minima to undo with are kept there; copy the adapter")


def keep_minimums(adapter: Path, fused: Checkpoint, minimums: Mapping[str, np.ndarray]) -> Path:
    """Write the replaced minima, float16 [out, blocks a row] by weight, beside the adapter."""
    from safetensors.numpy import save

    file = undo_file(adapter, model_digest(fused))
    with atomic_file(file, replace=True) as temporary:
        temporary.write_bytes(save(dict(minimums)))  # save_file's errors on a full disk are not the system's
    return file


def write_undone(fused: Checkpoint, adapter: Path, out: Path, *, overwrite: bool = False) -> list[str]:
    """Write the model as it was before `adapter` was fused into it.

    Returns:
        The names of the weights that changed back.

    Raises:
        InputError: nothing is kept of this very model, or it does not fit; `out` exists or cannot be written.
    """
    check_folder(adapter)
    file = undo_file(adapter, model_digest(fused))
    if not file.is_file():
        raise InputError(
            f"{adapter}: keeps nothing that was replaced in {fused.path}; "
            "only block-sum adapters fused into q4_1 or q5_1 can be undone, from the files that fuse wrote"
        )
    kept = SafetensorsFile(file)
    try:
        entries = [fused.entry(name) for name in fused.names]
        with open_writer(out, entries, packed_config(fused), companions=fused, replace=overwrite) as writer:
            for entry in entries:
                if entry.name not in kept.entries:
                    writer.copy(entry.name, fused)
                    continue
                format = fused.format(entry.name)
                values = kept.read(entry.name).view(np.float16).reshape(kept.entries[entry.name].shape)
                blocks = fused.read_bytes(entry.name).reshape(entry.shape)
                if format is None or not format.has_minimum:
                    raise InputError(f"{file}: {entry.name} has no minima in {fused.path}; damaged")
                try:
                    restored = native_adapters.with_minimums(format.name, blocks, values)
                except ValueError as error:
                    raise InputError(f"{file}: {entry.name}: {error}") from None
                writer.write_bytes(entry.name, restored.reshape(-1), entry)
        return list(kept.entries)
    finally:
        kept.close()
