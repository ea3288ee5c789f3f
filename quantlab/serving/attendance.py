"""A client that waits for a turn: what the turn emits goes to it, and when it goes away the turn is let go of."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from starlette.requests import Request

from quantlab.serving.request_log import notes_of
from quantlab.serving.turns import Finished, Turn, Turns

PAUSE = 0.04  # seconds that pieces gather for one message, so that tokens of a small model cost less than they take


class Attendance:
    """Of one request whose body has been read.

    Raises:
        ApiError: 429 or 503, there is no turn to be had.
    """

    def __init__(self, request: Request, turns: Turns, work: Callable[[Turn], Any]) -> None:
        self._turns, self._notes = turns, notes_of(request.scope)
        self._turn = turns.ask(work, asyncio.get_running_loop())
        self._watching = asyncio.create_task(self._watch(request))
        self._has_begun = False

    async def items(self) -> list[Any]:
        """What the turn has emitted since the last call, at least one item; a `Finished` is the last of all.

        Raises:
            ApiError: the turn failed before all else; later a `Finished` tells it.
        """
        if self._has_begun:
            await self._turn.channel.pause(PAUSE)
        items = await self._turn.channel.take()
        if not self._has_begun:
            self._has_begun = True
            self._notes.note_first()
            if isinstance(items[0], Finished):
                result_of(items[0])
        return items

    async def result(self) -> Any:  # Any: the work's
        """What a turn made that emits nothing; nobody waits afterwards.

        Raises:
            ApiError: it failed.
        """
        try:
            (finished,) = await self.items()
            return finished.value
        finally:
            self.close()

    def close(self) -> None:
        """Nobody waits any more."""
        self._watching.cancel()
        if self._turn.taken is None:
            self._turns.cancel(self._turn)
        self._notes.waited, self._notes.taken = self._turn.waited, self._turn.taken

    async def _watch(self, request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self._turns.cancel(self._turn)


def result_of(end: Finished) -> Any:  # Any: the work's
    """What a turn made.

    Raises:
        ApiError: it failed.
    """
    if end.error is not None:
        raise end.error
    return end.value
