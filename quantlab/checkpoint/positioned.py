"""Positioned reads and writes on a file descriptor: all the bytes, or an error that names the file."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import numpy as np

from quantlab.errors import InputError

READ_CHUNK = 1 << 26  # Linux reads at most 2 GiB at a time
# What headers that promise more than their files hold mean, and how to mend it.
DAMAGED = "damaged or cut short; download it again"
CUT_SHORT = "the file is cut short; download it again"


def open_to_read(path: Path) -> int:
    """A descriptor of `path`.

    Raises:
        InputError: it cannot be opened, or is no plain file (a pipe or device would never end).
    """
    try:
        if stat.S_ISREG(path.stat().st_mode):  # asked before opening, which alone moves a tape
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            if stat.S_ISREG(os.fstat(descriptor).st_mode):  # another file may be there by now
                return descriptor
            os.close(descriptor)
    except OSError as error:
        raise InputError(f"{path}: cannot be opened: {error.strerror}") from None
    except ValueError as error:  # a zero byte in the name, or half of a surrogate pair
        raise InputError(f"{path}: cannot be opened: {error}") from None
    raise InputError(f"{path}: is a folder, pipe or device where a file should be")


def read_exactly(descriptor: int, nbytes: int, offset: int, path: Path, what: str) -> np.ndarray:
    """`nbytes` bytes from `offset` on, a fresh uint8 array; `what` is what errors call them.

    Raises:
        InputError: the file ends before, the system fails to read it, or there is no memory for it.
    """
    try:
        out = np.empty(nbytes, dtype=np.uint8)
    except (MemoryError, ValueError):  # numpy: more than there is, more than an address can count
        raise InputError(f"{path}: no memory for the {nbytes} bytes of {what}; a larger machine is needed") from None
    read_into(out, descriptor, offset, path, what)
    return out


def read_into(out: np.ndarray, descriptor: int, offset: int, path: Path, what: str) -> None:
    """Fill `out` (uint8) from `offset` on.

    Raises:
        InputError: the file ends before, or the system fails to read it.
    """
    view, done = out.data, 0
    while done < out.nbytes:
        try:
            count = os.preadv(descriptor, [view[done : done + READ_CHUNK]], offset + done)
        except OSError as error:
            raise InputError(f"{path}: cannot be read at {what}: {error.strerror}") from None
        if count == 0:
            raise InputError(f"{path}: ends in the middle of {what}; the file was cut while open")
        done += count


def read_whole(path: Path, most: int) -> bytes:
    """The content of a file of at most so many bytes.

    Raises:
        InputError: it cannot be opened or read, is no plain file, or is larger.
    """
    descriptor = open_to_read(path)
    try:
        size = os.fstat(descriptor).st_size
        if size > most:
            raise InputError(f"{path}: has {size} bytes, too many for such a file; download it again")
        return read_exactly(descriptor, size, 0, path, "its text").tobytes()
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: memoryview, offset: int) -> None:
    """Write `data` at `offset`; the system may take it in pieces."""
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)
