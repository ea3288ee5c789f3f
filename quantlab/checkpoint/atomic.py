"""Folders that appear complete or not at all: written beside their destination, synced, then renamed."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from quantlab.errors import InputError

LOCK_NAME = ".quantlab-lock"


@contextlib.contextmanager
def atomic_folder(destination: Path, replace: bool) -> Iterator[Path]:
    """Yield a temporary folder that becomes `destination` when the block ends without an exception.

    The temporary folder lies beside the destination under a fixed hidden name, locked while in use, so that the next
    run clears what a killed one left. Whatever kills the process, the destination holds the old content or the
    complete new one.

    Args:
        destination: where the folder goes.
        replace: whether an existing destination may be replaced.

    Raises:
        InputError: the destination exists and may not be replaced, its parent cannot be written, or another process is
            writing it.
    """
    destination = Path(os.path.abspath(destination))  # noqa: PTH100 resolve() would follow a link at the destination
    if destination.exists() and not replace:
        raise InputError(f"{destination}: exists already; choose another name or pass --overwrite")
    temporary = destination.with_name(f".{destination.name}.partial")
    lock = _claim(temporary)
    try:
        yield temporary
        (temporary / LOCK_NAME).unlink()
        _sync_tree(temporary)
        _move_into_place(temporary, destination)
        _sync_folder(destination.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _claim(temporary: Path) -> int:
    """Make the folder empty and ours; the descriptor of its lock."""
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        lock = os.open(temporary / LOCK_NAME, os.O_CREAT | os.O_RDWR | getattr(os, "O_CLOEXEC", 0), 0o644)
    except OSError as error:
        raise InputError(f"{temporary.parent}: cannot be written: {error.strerror}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise InputError(f"{temporary}: another process is writing this output") from None
    for leftover in temporary.iterdir():
        if leftover.name != LOCK_NAME:
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    return lock


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move_into_place(temporary: Path, destination: Path) -> None:
    if not destination.exists():
        temporary.rename(destination)
    elif _exchange(temporary, destination):
        _remove(temporary)
    else:  # no atomic exchange on this system: both contents are on disk at every moment, one of them hidden
        old = destination.with_name(f".{destination.name}.old")
        destination.rename(old)
        temporary.rename(destination)
        _remove(old)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step (Linux renameat2, RENAME_EXCHANGE = 2); False where the system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    at_current_folder = -100  # AT_FDCWD
    if rename(at_current_folder, os.fsencode(one), at_current_folder, os.fsencode(other), 2) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS):
        return False
    raise OSError(code, os.strerror(code), str(other))
