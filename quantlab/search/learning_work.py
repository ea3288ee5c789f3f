"""Unfinished learning of a merge's coefficients: a folder beside the destination, until that is written."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from quantlab.calibration.work_folder import OPTIONS, check_options, write_options
from quantlab.errors import InputError

STATE, START = "state.json", "start"


def learning_folder_of(out: Path) -> Path:
    """Where the unfinished work for destination `out` is kept."""
    return out.with_name(f"{out.name}.learning")


@contextlib.contextmanager
def open_learning(
    out: Path, options: Mapping[str, Any], *, resume: bool, discard: bool, say: list[str]
) -> Iterator[Path]:
    """The folder, locked; it stays after a failure as long as there is a state in it, else it goes.

    Args:
        options: JSON values that decide what is learned; unfinished work of others is not gone on with.
        resume: go on with unfinished work, if there is any.
        discard: throw unfinished work away otherwise, instead of refusing.
        say: takes a note where there is nothing to resume.

    Raises:
        InputError: there is unfinished work that was not asked for or of other options, another process is at it, or
            the folder cannot be written.
    """
    folder = learning_folder_of(out)
    with _locked(folder):
        begun = (folder / STATE).is_file() and (folder / OPTIONS).is_file()
        if begun and resume:
            check_options(folder, options)
        elif begun and not discard:
            raise InputError(f"{folder}: holds unfinished work; pass --resume to go on with it, or delete the folder")
        else:
            if resume:
                say.append(f"nothing to resume: {folder} holds no unfinished work; began anew")
            _clear(folder)
            write_options(folder, options)
        try:
            yield folder
        except BaseException:
            if not (folder / STATE).is_file():
                shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise InputError(f"{folder}: another process is at work there; wait, or choose another name") from None
    try:
        yield
    finally:
        os.close(descriptor)


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
