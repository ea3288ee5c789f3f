"""Answers of a chat in OpenAI's shape: whole, or as the chunks of a stream."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from quantlab.generation.generator import Completion
from quantlab.generation.log_probabilities import Alternative, TokenLogprob
from quantlab.serving.reasoning import ReasoningSplit, split_reasoning
from quantlab.serving.texts import Piece
from quantlab.serving.token_texts import TokenTexts
from quantlab.serving.usage import timings_of, usage_of


@dataclass
class ChatAnswer:
    """One response.

    Attributes:
        model: the name that the client knows.
        ends: tokens that end a text and are no part of it.
        splits: reasoning is to be told apart; `is_inside` it from the first token on.
        sources: the passages that the model was given; None where none were asked for.
    """

    model: str
    tokens: TokenTexts
    ends: frozenset[int]
    splits: bool
    is_inside: bool
    sources: Sequence[Mapping[str, Any]] | None = None
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self._streams: dict[int, ReasoningSplit] = {}
        self._told: dict[int, int] = {}  # log-probabilities that were sent, by sample

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """The response that is not streamed."""
        choices = [self._choice(number, completion) for number, completion in enumerate(completions)]
        body = {**self._head("chat.completion"), "choices": choices}
        body |= {"usage": usage_of(completions), "timings": timings_of(completions)}
        return body if self.sources is None else {**body, "sources": self.sources}

    def first(self, samples: int) -> list[dict[str, Any]]:
        """The chunks before any text: whose message it is, and what it was given."""
        chunks = [self._chunk(number, {"role": "assistant", "content": ""}) for number in range(samples)]
        if self.sources is not None:
            chunks[0]["sources"] = self.sources
        return chunks

    def pieces(self, pieces: Iterable[Piece]) -> list[dict[str, Any]]:
        """The chunks for parts of texts, those of a sample joined."""
        joined: dict[int, list[Piece]] = {}
        for piece in pieces:
            joined.setdefault(piece.sample, []).append(piece)
        chunks = []
        for sample, parts in joined.items():
            text = "".join(part.text for part in parts)
            told = [one for part in parts for one in part.logprobs]
            self._told[sample] = self._told.get(sample, 0) + len(told)
            delta = self._delta(*self._stream(sample).add(text)) if self.splits else {"content": text}
            if delta or told:
                chunks.append(self._chunk(sample, delta, logprobs=self._logprobs(told)))
        return chunks

    def last(self, completions: Sequence[Completion], *, with_usage: bool) -> list[dict[str, Any]]:
        """The chunks behind all text: why it ended, how fast it was and, if asked for, what it took."""
        chunks = []
        for sample, completion in enumerate(completions):
            rest = self._delta(*self._stream(sample).rest()) if self.splits else {}
            told = self._logprobs((completion.logprobs or ())[self._told.get(sample, 0) :])
            if rest or told:
                chunks.append(self._chunk(sample, rest, logprobs=told))
            chunks.append(self._chunk(sample, {}, finish=completion.finish_reason))
        chunks[-1]["timings"] = timings_of(completions)
        if with_usage:
            chunks.append({**self._head("chat.completion.chunk"), "choices": [], "usage": usage_of(completions)})
        return chunks

    def _choice(self, number: int, completion: Completion) -> dict[str, Any]:
        reasoning, text = None, completion.text
        if self.splits:
            reasoning, text = split_reasoning(completion.text, is_inside=self.is_inside)
        message = {"role": "assistant", "content": text}
        if reasoning is not None:
            message["reasoning_content"] = reasoning
        logprobs = None if completion.logprobs is None else self._logprobs(completion.logprobs) or {"content": []}
        return {
            "index": number, "message": message, "logprobs": logprobs, "finish_reason": completion.finish_reason
        }  # fmt: skip

    def _stream(self, sample: int) -> ReasoningSplit:
        return self._streams.setdefault(sample, ReasoningSplit(is_inside=self.is_inside))

    def _delta(self, reasoning: str, text: str) -> dict[str, Any]:
        parts = {"reasoning_content": reasoning, "content": text}
        return {name: part for name, part in parts.items() if part}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _chunk(
        self, sample: int, delta: dict[str, Any], *, finish: str | None = None, logprobs: Any = None
    ) -> dict[str, Any]:
        choice = {"index": sample, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def _logprobs(self, told: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        """None where there are none; the end token is no part of the text."""
        shown = [
            {**self._token(one), "top_logprobs": [self._token(other) for other in one.top]}
            for one in told
            if one.token_id not in self.ends
        ]
        return {"content": shown} if shown else None

    def _token(self, one: Alternative) -> dict[str, Any]:
        content = list(self.tokens.bytes_of(one.token_id))
        return {"token": self.tokens.text_of(one.token_id), "logprob": one.logprob, "bytes": content}
