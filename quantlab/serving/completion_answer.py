"""Continued texts in the shape of OpenAI's completions: whole, or as the chunks of a stream."""

from __future__ import annotations

import codecs
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from quantlab.generation.generator import Completion
from quantlab.generation.log_probabilities import TokenLogprob
from quantlab.serving.texts import Piece
from quantlab.serving.token_texts import TokenTexts
from quantlab.serving.usage import timings_of, usage_of


@dataclass(frozen=True)
class Continued:
    """A prompt, as ids and as text, and its samples."""

    prompt_ids: list[int]
    prompt: str
    samples: list[Completion]


@dataclass
class CompletionAnswer:
    """One response.

    Attributes:
        model: the name that the client knows.
        echo: texts begin with their prompts.
    """

    model: str
    tokens: TokenTexts
    echo: bool
    id: str = field(default_factory=lambda: f"cmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self._told: dict[int, int] = {}  # log-probabilities that were sent, by text
        self._length: dict[int, int] = {}  # characters, likewise

    def whole(self, continued: Sequence[Continued]) -> dict[str, Any]:
        """The response that is not streamed."""
        choices: list[dict[str, Any]] = []
        for one in continued:
            for completion in one.samples:
                text = one.prompt + completion.text if self.echo else completion.text
                logprobs = self._all_logprobs(one, completion)
                choices.append(_choice(len(choices), text, logprobs, completion.finish_reason))
        return {**self._head(), "choices": choices, **_counts(continued)}

    def first(self, prompts: Sequence[str], samples: int) -> list[dict[str, Any]]:
        """The chunks before any text: the prompts, where they are echoed."""
        for number in range(len(prompts) * samples):
            self._length[number] = len(prompts[number // samples])
        if not self.echo:
            return []
        return [self._chunk(number, prompts[number // samples]) for number in range(len(prompts) * samples)]

    def pieces(self, pieces: Iterable[Piece]) -> list[dict[str, Any]]:
        """The chunks for parts of texts, those of a text joined."""
        joined: dict[int, list[Piece]] = {}
        for piece in pieces:
            joined.setdefault(piece.sample, []).append(piece)
        chunks = []
        for number, parts in joined.items():
            text, told = "".join(part.text for part in parts), [one for part in parts for one in part.logprobs]
            chunks.append(self._chunk(number, text, self._next_logprobs(number, told) if told else None))
            self._length[number] += len(text)
        return chunks

    def last(self, continued: Sequence[Continued], *, with_usage: bool) -> list[dict[str, Any]]:
        """The chunks behind all text: why it ended, how fast it was and, if asked for, what it took."""
        chunks = []
        completions = [completion for one in continued for completion in one.samples]
        for number, completion in enumerate(completions):
            told = (completion.logprobs or ())[self._told.get(number, 0) :]
            logprobs = self._next_logprobs(number, told) if told else None
            chunks.append(self._chunk(number, "", logprobs, completion.finish_reason))
        counts = _counts(continued)
        chunks[-1]["timings"] = counts["timings"]
        return [*chunks, {**self._head(), "choices": [], "usage": counts["usage"]}] if with_usage else chunks

    def _all_logprobs(self, one: Continued, completion: Completion) -> dict[str, Any] | None:
        if completion.logprobs is None and completion.prompt_logprobs is None:
            return None
        generated = completion.logprobs or ()
        if not self.echo:
            return self._logprobs([token.token_id for token in generated], generated, len(one.prompt))
        ids = [*one.prompt_ids, *(token.token_id for token in generated)]
        # Decoders drop the space that they put before a text, and the start token is no part of it.
        before = self._length_of(one.prompt_ids) - len(one.prompt)
        return self._logprobs(ids, [*(completion.prompt_logprobs or ()), *generated], -max(before, 0))

    def _next_logprobs(self, number: int, told: Sequence[TokenLogprob]) -> dict[str, Any]:
        self._told[number] = self._told.get(number, 0) + len(told)
        return self._logprobs([one.token_id for one in told], told, self._length[number])

    def _logprobs(self, ids: Sequence[int], told: Sequence[TokenLogprob | None], start: int) -> dict[str, Any]:
        """Lists over tokens. Where several tokens have one text, `top_logprobs` keeps the likeliest."""
        offsets, decoder, place = [], codecs.getincrementaldecoder("utf-8")("replace"), start
        for token in ids:
            offsets.append(max(place, 0))
            place += len(decoder.decode(self.tokens.bytes_of(token)))
        return {
            "tokens": [self.tokens.text_of(token) for token in ids],
            "token_logprobs": [None if one is None else one.logprob for one in told],
            "top_logprobs": [None if one is None else self._top(one) for one in told],
            "text_offset": offsets,
        }

    def _top(self, one: TokenLogprob) -> dict[str, float]:
        found: dict[str, float] = {}
        for other in (*one.top, one):
            found.setdefault(self.tokens.text_of(other.token_id), other.logprob)
        return found

    def _length_of(self, ids: Sequence[int]) -> int:
        return len(b"".join(self.tokens.bytes_of(token) for token in ids).decode("utf-8", "replace"))

    def _head(self) -> dict[str, Any]:
        return {"id": self.id, "object": "text_completion", "created": self.created, "model": self.model}

    def _chunk(
        self, number: int, text: str, logprobs: dict[str, Any] | None = None, finish: str | None = None
    ) -> dict[str, Any]:
        return {**self._head(), "choices": [_choice(number, text, logprobs, finish)]}


def _choice(number: int, text: str, logprobs: dict[str, Any] | None, finish: str | None) -> dict[str, Any]:
    return {"index": number, "text": text, "logprobs": logprobs, "finish_reason": finish}


def _counts(continued: Sequence[Continued]) -> dict[str, Any]:
    completions = [completion for one in continued for completion in one.samples]
    return {"usage": usage_of(completions, len(continued)), "timings": timings_of(completions, len(continued))}
