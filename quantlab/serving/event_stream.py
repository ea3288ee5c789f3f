"""Server-sent events: a JSON object each, `[DONE]` at the end, and an error object where the answer breaks off."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.types import Receive, Scope, Send

from quantlab.serving.api_error import ApiError
from quantlab.serving.request_log import notes_of

HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache, no-transform",
    "x-accel-buffering": "no",  # nginx would gather what is to be shown at once
}
DONE = b"data: [DONE]\n\n"


class EventStream:
    """A response.

    Args:
        chunks: objects, as many at a time as there are.
        close: called when nothing more is sent, whatever the reason.
    """

    def __init__(self, chunks: AsyncIterator[list[dict[str, Any]]], close: Callable[[], None]) -> None:
        self._chunks, self._close = chunks, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            async for chunks in self._chunks:
                await _send(send, b"".join(map(_event, chunks)))
            await _send(send, DONE)
        except ApiError as error:
            notes_of(scope).error = error.message
            await _send(send, _event(error.body()))
        finally:
            self._close()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _event(chunk: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(chunk, ensure_ascii=False, separators=(",", ":")).encode("utf-8") + b"\n\n"


async def _send(send: Send, body: bytes) -> None:
    if body:
        await send({"type": "http.response.body", "body": body, "more_body": True})
