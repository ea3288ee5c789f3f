"""Turns at the engine: one request at a time, in the order of arrival, on a thread of its own."""

from __future__ import annotations

import logging
import math
import threading
import time
from asyncio import AbstractEventLoop
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from quantlab.errors import InputError
from quantlab.serving.api_error import ApiError
from quantlab.serving.channel import Channel

logger = logging.getLogger(__name__)
FIRST_GUESS = 2.0  # seconds of a turn, before any has been measured
SMOOTHING = 0.2  # weight of the last turn in the mean


class Cancelled(Exception):  # noqa: N818 - no error
    """Nobody waits for the result any more."""


@dataclass(frozen=True)
class Finished:
    """The last item of a turn: its result, or what it failed with."""

    value: Any = None  # Any: of the turn's work
    error: ApiError | None = None


class Turn:
    """One request's turn.

    Attributes:
        channel: what the work emits, and at the end a `Finished`.
        waited: seconds in the queue; taken: seconds of work. None until they are known.
        cancelled: looked at by the work between tokens.
    """

    def __init__(self, work: Callable[[Turn], Any], loop: AbstractEventLoop) -> None:
        self.channel: Channel[Any] = Channel(loop)
        self.cancelled: ApiError | None = None
        self.waited: float | None = None
        self.taken: float | None = None
        self._work, self._asked = work, time.perf_counter()

    def check(self) -> None:
        """Raise `Cancelled` if nobody waits for the result."""
        if self.cancelled is not None:
            raise Cancelled

    def run(self) -> bool:
        """Work, and tell how it ended; False after a failure that nobody foresaw."""
        begun = time.perf_counter()
        self.waited = begun - self._asked
        is_sound, end = True, Finished()
        try:
            self.check()
            end = Finished(self._work(self))
        except Cancelled:
            end = Finished(error=self.cancelled)
        except ApiError as error:
            end = Finished(error=error)
        except InputError as error:
            end = Finished(error=ApiError(400, str(error)))
        except Exception as error:
            logger.exception("a request failed")
            is_sound = False
            end = Finished(error=ApiError(500, f"the server failed on this request: {type(error).__name__}"))
        self.taken = time.perf_counter() - begun
        self.channel.put(end, is_last=True)
        return is_sound

    def refuse(self, error: ApiError) -> None:
        """End it without work."""
        self.waited = time.perf_counter() - self._asked
        self.channel.put(Finished(error=error), is_last=True)


def gone() -> ApiError:
    """For nobody but the log; the status is nginx's."""
    return ApiError(499, "the client has gone")


def stopping() -> ApiError:
    """To whom comes or waits while the server ends."""
    return ApiError(503, "the server is stopping", code="stopping", headers={"Connection": "close"})


class Turns:
    """The queue and its thread.

    Args:
        most_waiting: requests that may wait beside the one that runs.
        release: called on the thread when nothing has been asked for `idle_seconds`, and after a failure.
        settle: called on it behind every other turn, when its result is on the way.
    """

    def __init__(
        self,
        most_waiting: int,
        release: Callable[[], None],
        idle_seconds: float | None = None,
        settle: Callable[[], None] = lambda: None,
    ) -> None:
        self._most_waiting, self._idle_seconds = most_waiting, idle_seconds
        self._release, self._settle = release, settle
        self._changed = threading.Condition()
        self._waiting: deque[Turn] = deque()
        self._running: Turn | None = None
        self._is_stopping = False
        self._mean = FIRST_GUESS
        self._thread = threading.Thread(target=self._serve, name="quantlab-engine", daemon=True)

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def is_running(self) -> bool:
        """Whether a request is being worked on."""
        return self._running is not None

    @property
    def is_stopping(self) -> bool:
        """Whether requests are refused because the server ends."""
        return self._is_stopping

    def ask(self, work: Callable[[Turn], Any], loop: AbstractEventLoop) -> Turn:
        """Queue a piece of work.

        Raises:
            ApiError: 429, the queue is full; 503, the server is stopping.
        """
        turn = Turn(work, loop)
        with self._changed:
            if self._is_stopping:
                raise stopping()
            # Where none runs, the first that waits is about to.
            if len(self._waiting) + self.is_running > self._most_waiting:
                seconds = max(1, math.ceil(self._mean * (len(self._waiting) + 1)))
                raise ApiError(
                    429,
                    f"the queue is full: {len(self._waiting)} requests wait; try again in {seconds} s",
                    code="queue_full",
                    headers={"Retry-After": str(seconds)},
                )
            self._waiting.append(turn)
            self._changed.notify_all()
        return turn

    def cancel(self, turn: Turn) -> None:
        """Let go of a turn whose client has gone, whether it waits or runs."""
        with self._changed:
            turn.cancelled = gone()
            if turn in self._waiting:
                self._waiting.remove(turn)
                turn.refuse(turn.cancelled)

    def stop(self) -> None:
        """Refuse what waits and what is to come; the one that runs goes on."""
        with self._changed:
            self._is_stopping = True
            waiting, self._waiting = list(self._waiting), deque()
            for turn in waiting:
                turn.refuse(stopping())
            self._changed.notify_all()

    def cut(self) -> None:
        """Cancel the one that runs."""
        with self._changed:
            if self._running is not None:
                self._running.cancelled = stopping()

    def join(self, seconds: float) -> bool:
        """Wait for the thread to end after `stop`; whether it has."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _serve(self) -> None:
        while (turn := self._next()) is not None:
            if turn.run():
                self._settle()
            else:
                self._release()
            with self._changed:
                self._running = None
                if turn.taken is not None:
                    self._mean += SMOOTHING * (turn.taken - self._mean)

    def _next(self) -> Turn | None:
        """The next turn, as soon as there is one; None at the end."""
        with self._changed:
            while not self._waiting:
                if self._is_stopping:
                    return None
                if not self._changed.wait(self._idle_seconds) and not self._waiting:
                    self._release()
                    self._changed.wait_for(lambda: self._waiting or self._is_stopping)
            self._running = self._waiting.popleft()
            return self._running
