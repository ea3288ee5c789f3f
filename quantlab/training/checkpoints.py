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
    return next(reversed(_marked(folder)), None)


def remove_older(folder: Path, kept: int, best: str | None = None) -> None:
    """Keep the newest `kept` marked checkpoints, or `best`, where it is older, and one less of them.

    A checkpoint loses its mark before its files, so that one whose removal was cut short is none any more. (The
    Trainer's own rotation goes by folders' times, which a removal cut short makes the newest.)
    """
    marked = _marked(folder)
    keep = [path.name for path in marked[-kept:]]
    name = None if best is None else Path(best).name
    if name in {path.name for path in marked} - set(keep):
        keep[0] = str(name)
    for path in marked:
        if path.name not in keep:
            (path / MARKER).unlink()
            _sync(path)
            shutil.rmtree(path, ignore_errors=True)


def _marked(folder: Path) -> list[Path]:
    """Ascending by steps."""
    found = [path for path in folder.glob("checkpoint-*") if (path / MARKER).is_file() and step_of(path) is not None]
    return sorted(found, key=lambda path: step_of(path) or 0)


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
