"""Ctrl-C and SIGTERM as exceptions, put off while a module is being imported.

An import of torch that is broken off may swallow the exception, and what tries it again crashes.
"""

from __future__ import annotations

import signal
from types import FrameType

_PAUSE = 0.02  # seconds until an import is looked for again
_pending = signal.SIGINT


def heed_signals() -> None:
    """From now on raise KeyboardInterrupt for SIGINT, unless it is ignored, and SystemExit for SIGTERM."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _heed)
    signal.signal(signal.SIGTERM, _heed)
    signal.signal(signal.SIGALRM, _heed)


def _heed(number: int, frame: FrameType | None) -> None:
    global _pending
    if number != signal.SIGALRM:
        _pending = signal.Signals(number)
    if _is_importing(frame):
        signal.setitimer(signal.ITIMER_REAL, _PAUSE)
    elif _pending == signal.SIGINT:
        raise KeyboardInterrupt
    else:
        raise SystemExit(128 + _pending)  # unwinds, so that temporary folders go


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False
