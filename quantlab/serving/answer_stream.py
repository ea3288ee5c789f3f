"""A turn's items as the chunks of a stream."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

from quantlab.serving.attendance import Attendance, result_of
from quantlab.serving.texts import Piece
from quantlab.serving.turns import Finished

Chunks = list[dict[str, Any]]


async def answer_chunks(
    attendance: Attendance,
    first: list[Any],
    begun: Chunks,
    pieces: Callable[[Iterable[Piece]], Chunks],
    end: Callable[[Any], Chunks],
) -> AsyncIterator[Chunks]:
    """Chunks, as many at a time as there are.

    Args:
        first: the turn's items so far, at least one.
        begun: what the stream begins with.
        pieces: makes chunks of pieces.
        end: makes the last chunks of the turn's result.

    Raises:
        ApiError: the turn failed; what it had written before has been given out.
    """
    chunks, items = begun, first
    while not isinstance(items[-1], Finished):
        yield chunks + pieces(items)
        chunks, items = [], await attendance.items()
    *rest, finished = items
    chunks += pieces(rest)
    if finished.error is not None:
        yield chunks
    yield chunks + end(result_of(finished))
