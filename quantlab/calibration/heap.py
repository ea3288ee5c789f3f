"""glibc's heap, kept from holding on to what threads have freed: with many threads that come and go it would keep the
most that each of them ever used. Elsewhere nothing is done.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache

_ARENA_MAX = -8  # of mallopt(3), <malloc.h>
ARENAS = 2  # the main thread's, and one that all others share


@cache
def share_heaps() -> None:
    """Let threads that start from now on share one heap. Holds for the whole process, and costs no speed where threads
    ask for large pieces.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_ARENA_MAX, ARENAS)


def give_back() -> None:
    """Return freed memory to the system."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
