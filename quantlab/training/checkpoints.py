"""The Trainer's checkpoints, which it saves file by file: a marker written last tells which are complete."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

MARKER = "complete"


def mark_complete(checkpoint: Path) -> None:
    """Note that all files of `checkpoint` are written, once they have reached the disk."""
    for file in checkpoint.rglob("*"):
        if file.is_file():
            _sync(file)
    _sync(checkpoint)
    marker = checkpoint / MARKER
    marker.touch()
    _sync(marker)
    _sync(checkpoint)


def newest_complete(folder: Path) -> Path | None:
    """The marked checkpoint of the most steps in the Trainer's output folder."""
    found = [path for path in folder.glob("checkpoint-*") if (path / MARKER).is_file() and step_of(path) is not None]
    return max(found, key=lambda path: step_of(path) or 0, default=None)


def remove_incomplete(folder: Path) -> None:
    """Free what unmarked checkpoints take, as a full disk leaves them."""
    for path in folder.glob("checkpoint-*"):
        if not (path / MARKER).exists():
            shutil.rmtree(path, ignore_errors=True)


def step_of(checkpoint: Path) -> int | None:
    """The number of steps that a checkpoint's name tells; None for a folder that is none."""
    digits = checkpoint.name.removeprefix("checkpoint-")
    return int(digits) if digits.isdecimal() else None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
