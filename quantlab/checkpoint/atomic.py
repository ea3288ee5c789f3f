"""Folders and files that appear complete or not at all: written beside their destination, synced, then renamed."""

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


@contextlib.contextmanager
def atomic_folder(destination: Path, replace: bool, unfinished: Path | None = None) -> Iterator[Path]:
    """Yield a temporary folder that becomes `destination` when the block ends without an exception.

    The temporary folder lies beside the destination under a fixed hidden name, and so does a lock file, so that the
    next run clears what a killed one left. Whatever kills the process, the destination holds the old content or the
    complete new one.

    Args:
        destination: where the folder goes.
        replace: whether an existing destination may be replaced.
        unfinished: the temporary folder's place, on the same file system. What lies there is gone on with, and stays
            after a failure.

    Raises:
        InputError: the destination exists and may not be replaced, its parent cannot be written, or another process is
            writing it.
    """
    with _atomic(destination, replace, unfinished) as temporary:
        temporary.mkdir(exist_ok=unfinished is not None)
        yield temporary


@contextlib.contextmanager
def atomic_file(destination: Path, replace: bool, unfinished: Path | None = None) -> Iterator[Path]:
    """Like `atomic_folder`, for a file that the block has to create at the path it gets."""
    with _atomic(destination, replace, unfinished) as temporary:
        yield temporary


@contextlib.contextmanager
def _atomic(destination: Path, replace: bool, unfinished: Path | None) -> Iterator[Path]:
    destination = Path(os.path.abspath(destination))  # noqa: PTH100 resolve() would follow a link at the destination
    _check_replaceable(destination)
    if not replace:
        _check_free(destination)
    temporary = unfinished or destination.with_name(f".{destination.name}.partial")
    with _locked(destination.with_name(f".{destination.name}.lock"), destination):
        if not replace:
            _check_free(destination)  # once more: another process may have finished it before we had the lock
        if unfinished is None and os.path.lexists(temporary):
            _remove(temporary)
        try:
            yield temporary
            _sync_tree(temporary)
            _move_into_place(temporary, destination, replace)
            _sync_entry(destination.parent)
        except BaseException:
            if unfinished is None:
                _discard(temporary)
            raise


def check_destination(destination: Path, replace: bool) -> None:
    """Refuse at once what `atomic_folder` and `atomic_file` will refuse, before any work.

    Raises:
        InputError: the destination exists and may not be replaced, or is none.
    """
    destination = Path(os.path.abspath(destination))  # noqa: PTH100 as above
    _check_replaceable(destination)
    if not replace:
        _check_free(destination)


def _check_replaceable(destination: Path) -> None:
    """A device, a pipe or a socket is no checkpoint, whatever the user allows to overwrite: think of /dev/null. Nor is
    the folder that the user is in: an empty name stands for it.
    """
    if Path.cwd().is_relative_to(destination):
        raise InputError(f"{destination}: is the current folder, or one around it; choose another name")
    if destination.exists() and not (destination.is_file() or destination.is_dir()):
        raise InputError(f"{destination}: is neither a file nor a folder; choose another name")


def _check_free(destination: Path) -> None:
    if os.path.lexists(destination):
        raise InputError(f"{destination}: exists already; choose another name or pass --overwrite")


@contextlib.contextmanager
def _locked(lock: Path, destination: Path) -> Iterator[None]:
    """Hold the lock file, and remove it afterwards."""
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(lock)
    except BlockingIOError:
        raise InputError(f"{destination}: another process is writing it; wait, or choose another name") from None
    except FileExistsError:
        raise InputError(f"{lock.parent}: cannot be written: Not a directory") from None
    except OSError as error:
        raise InputError(f"{lock.parent}: cannot be written: {error.strerror}") from None
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)  # while it is held: nobody can hold it at the same time
        os.close(descriptor)


def _acquire(lock: Path) -> int:
    while True:
        descriptor = os.open(lock, os.O_CREAT | os.O_RDWR | getattr(os, "O_CLOEXEC", 0), 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_nlink:
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # a holder removed the file between our two calls: it guards nothing any more


def _sync_tree(root: Path) -> None:
    if root.is_dir():
        for path in root.rglob("*"):
            if path.is_file():
                _sync_entry(path)
    _sync_entry(root)


def _sync_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move_into_place(temporary: Path, destination: Path, replace: bool) -> None:
    if not replace:
        _check_free(destination)  # it may have appeared while we wrote
    if not os.path.lexists(destination):
        temporary.rename(destination)
    elif _exchange(temporary, destination):
        _remove(temporary)
    else:  # no atomic exchange on this system: both contents are on disk at every moment, one of them hidden
        old = destination.with_name(f".{destination.name}.old")
        if os.path.lexists(old):
            _remove(old)
        destination.rename(old)
        temporary.rename(destination)
        _remove(old)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _discard(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


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
