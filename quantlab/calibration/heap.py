"""glibc's heap, kept from holding on to what has been freed: with many threads that come and go it would keep the
most that each of them ever used, and between small pieces that stay it keeps the holes that large ones left. Elsewhere
nothing is done.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache

_ARENA_MAX, _MMAP_THRESHOLD, _TRIM_THRESHOLD = -8, -3, -1  # of mallopt(3), <malloc.h>
LARGE = 1 << 20  # bytes
LARGEST_REUSED = 8 << 20
ARENAS = 2  # the main thread's, and one that all others share


@cache
def share_heaps() -> None:
    """Let threads that start from now on share one heap. Holds for the whole process, and costs no speed where threads
    ask for large pieces.
    """
    _set(_ARENA_MAX, ARENAS)


@cache
def return_large_pieces() -> None:
    """Let pieces from 1 MB on go back to the system when they are freed. Holds for the whole process.

    glibc raises that bound to 32 MB as pieces are freed. A training step's activations lie between checkpoints that
    stay, so that on a model of 1.1 B parameters its peak was 2.6 GB instead of 1.4.
    """
    _set(_MMAP_THRESHOLD, LARGE)


@cache
def reuse_pieces() -> None:
    """Let the heap keep pieces of some MB for the next of their size: without, the system maps and clears each anew.
    Holds for the whole process, and keeps up to 16 MB a heap.
    """
    _set(_MMAP_THRESHOLD, LARGEST_REUSED)
    _set(_TRIM_THRESHOLD, 2 * LARGEST_REUSED)


def _set(parameter: int, value: int) -> None:
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(parameter, value)


def give_back() -> None:
    """Return freed memory to the system."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
