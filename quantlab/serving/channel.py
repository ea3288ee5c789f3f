"""From the thread that computes to the event loop: items in order, and few wake-ups.

A wake-up costs the computing thread a system call and a turn of the interpreter's lock, as much as a token of a small
model. So one wake-up announces all that follows until the loop takes it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Channel(Generic[Item]):
    """One thread puts, one task of the loop takes."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._items: deque[Item] = deque()
        self._ready, self._last = asyncio.Event(), asyncio.Event()
        self._is_announced = False

    def put(self, item: Item, *, is_last: bool = False) -> None:
        """Add an item, from any thread; the last one ends a pause of `take`."""
        self._items.append(item)
        try:
            if is_last:
                self._loop.call_soon_threadsafe(self._last.set)
            if not self._is_announced:
                self._is_announced = True
                self._loop.call_soon_threadsafe(self._ready.set)
        except RuntimeError:  # the loop has been closed: nobody listens
            return

    async def take(self) -> list[Item]:
        """All that has come, at least one item."""
        self._is_announced = False  # before looking: what comes from here on is either seen or announced
        while not self._items:
            await self._ready.wait()
            self._ready.clear()
        self._is_announced = True  # nothing is announced until the next call
        return [self._items.popleft() for _ in range(len(self._items))]

    async def pause(self, seconds: float) -> None:
        """Let items gather, for so long or until the last one has come."""
        try:
            async with asyncio.timeout(seconds):
                await self._last.wait()
        except TimeoutError:
            return
