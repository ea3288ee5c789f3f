"""One line a request on stderr, as JSON: who asked what, how it ended, what it took. Never texts, unless asked for."""

from __future__ import annotations

import datetime
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quantlab.generation.generator import Completion
from quantlab.serving.metrics import Metrics
from quantlab.serving.usage import usage_of

KEY = "quantlab.request"  # of the scope


@dataclass
class RequestNotes:
    """What endpoints note of one request.

    Attributes:
        path: the route's, not what was typed.
        first_piece: seconds until the first text.
        texts: told only if the server is to.
    """

    begun: float = field(default_factory=time.perf_counter)
    path: str = "other"
    model: str | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    waited: float | None = None
    taken: float | None = None
    first_piece: float | None = None
    error: str | None = None
    texts: dict[str, Any] = field(default_factory=dict)

    def note_first(self) -> None:
        """The first text goes out."""
        if self.first_piece is None:
            self.first_piece = time.perf_counter() - self.begun

    def note_completions(self, completions: Sequence[Completion], prompts: int = 1) -> None:
        """What was read and written."""
        usage = usage_of(completions, prompts)
        self.prompt_tokens, self.completion_tokens = usage["prompt_tokens"], usage["completion_tokens"]
        self.cached_tokens = usage["prompt_tokens_details"]["cached_tokens"]


def notes_of(scope: Scope) -> RequestNotes:
    """The notes of the request that is being answered."""
    notes: RequestNotes = scope[KEY]
    return notes


class RequestLog:
    """Writes the line, and counts the request, when it has been answered.

    Args:
        write: takes the line; stderr by default.
        log_texts: tell prompts and answers too.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: Metrics,
        write: Callable[[str], None] | None = None,
        log_texts: bool = False,
    ) -> None:
        self._app, self._metrics, self._write, self._log_texts = app, metrics, write or _to_stderr, log_texts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        notes = scope[KEY] = RequestNotes()
        status = 499  # nginx's, where the client has gone before an answer

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            self._count(notes, status)
            self._write(json.dumps(self._line(scope, notes, status), ensure_ascii=True))

    def _count(self, notes: RequestNotes, status: int) -> None:
        metrics = self._metrics
        metrics.count(notes.path, status)
        for name, count in {
            "prompt": notes.prompt_tokens, "cached": notes.cached_tokens, "generated": notes.completion_tokens
        }.items():  # fmt: skip
            if count:
                metrics.add_tokens(name, count)
        spans = {"queue": notes.waited, "run": notes.taken, "first_piece": notes.first_piece}
        for name, seconds in spans.items():
            if seconds is not None:
                metrics.observe(name, seconds)

    def _line(self, scope: Scope, notes: RequestNotes, status: int) -> dict[str, Any]:
        client = scope.get("client")
        told = {
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
            "client": client[0] if client else None,
            "method": scope["method"],
            "path": notes.path if notes.path != "other" else scope["path"][:200],
            "status": status,
            "model": notes.model,
            "prompt_tokens": notes.prompt_tokens,
            "cached_tokens": notes.cached_tokens,
            "completion_tokens": notes.completion_tokens,
            "queue_ms": _milliseconds(notes.waited),
            "run_ms": _milliseconds(notes.taken),
            "first_piece_ms": _milliseconds(notes.first_piece),
            "total_ms": _milliseconds(time.perf_counter() - notes.begun),
            "error": notes.error,
            **(notes.texts if self._log_texts else {}),
        }
        return {name: value for name, value in told.items() if value is not None}


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(1000 * seconds, 1)


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
