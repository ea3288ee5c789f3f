"""What ends a training that was set up well."""

from __future__ import annotations

import errno
import os

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TORCH_WRITER = ("PytorchStreamWriter", "unexpected pos")  # torch.save: that a write failed, and not why


class TrainingFailedError(RuntimeError):
    """The loss is no number any more, memory ran out, or the disk is full: one line that says where, what is left, and
    what to change.
    """


def disk_fault(error: BaseException) -> str | None:
    """Why a file could not be written, if that is what `error` says; None for any other error.

    safetensors and torch.save raise types of their own, whose text has the system's words in it, or less.
    """
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        return os.strerror(error.errno)
    text = str(error)
    for words in map(os.strerror, _NO_ROOM):
        if words in text:
            return words
    return "a write failed" if isinstance(error, RuntimeError) and any(w in text for w in _TORCH_WRITER) else None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the machine or its accelerator had no memory left; torch's allocator of CPUs has no error of its own."""
    import torch

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
