"""Prompt in, text out: tokenize, prefill, decode, stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from quantlab.adapters.combine import Source as AdapterSource
from quantlab.checkpoint import Tokenizer, load_tokenizer
from quantlab.errors import InputError
from quantlab.generation.constraints import Constraint
from quantlab.generation.engine import Engine
from quantlab.generation.engines import open_engine
from quantlab.generation.sampling import SamplingParams

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Timings:
    """Token counts and speeds; `cached_tokens` of the prompt needed no computing."""

    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float


@dataclass(frozen=True)
class Completion:
    """The generated part. `token_ids` holds every generated token, the end token and a stop string's included; `text`
    holds neither. `finish_reason` is "stop" at either or where a constraint is complete, "length" at a limit.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    engine: str
    timings: Timings


def generate(
    model: str | Path,
    prompt: str | Sequence[int],
    *,
    max_tokens: int = 128,
    params: SamplingParams | None = None,
    stop: Sequence[str] = (),
    on_text: Callable[[str], None] | None = None,
    engine: str = "auto",
    threads: int | None = None,
    adapters: Sequence[AdapterSource] | None = None,
) -> Completion:
    """Load `model` and continue `prompt`; see `complete`.

    Args:
        engine: "auto", "native" or "torch"; see `engines.open_engine`.
        threads: to compute with; by default one a core.
        adapters: low-rank updates to compute beside the weights; see `load_engine`.

    Raises:
        InputError: the model or an adapter cannot be loaded, or the prompt or a parameter is wrong.
    """
    tokenizer = load_tokenizer(model)
    return complete(
        open_engine(model, engine, threads=threads, adapters=adapters),
        tokenizer,
        prompt,
        max_tokens=max_tokens,
        params=params,
        stop=stop,
        on_text=on_text,
    )


def complete(
    engine: Engine,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    *,
    max_tokens: int = 128,
    params: SamplingParams | None = None,
    stop: Sequence[str] = (),
    on_text: Callable[[str], None] | None = None,
    constraint: Constraint | None = None,
) -> Completion:
    """Continue `prompt` by up to `max_tokens` tokens.

    Ctrl-C while it runs leaves an engine that can go on: its sequence is a beginning of prompt and generated tokens.

    Args:
        prompt: a text, or token ids, which are taken as they are.
        stop: strings that end the text; they are not part of it.
        on_text: called with each piece of text as soon as it is certain.
        constraint: what may be generated; used up by the call.

    Raises:
        InputError: an empty stop string, a prompt longer than the context, no room to generate, or a constraint that
            allows no token.
    """
    check_limits(max_tokens, stop)
    params = params or SamplingParams()
    prompt_ids = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
    # Already here: parameters that are wrong must not cost a prefill.
    drawn = engine.decode(params, max_tokens, constraint)
    started = time.perf_counter()
    cached = engine.prefill(prompt_ids)
    prefilled = time.perf_counter()
    text = TextStream(tokenizer, prompt_ids, stop, on_text)
    has_stopped = False
    with drawn:
        for token in drawn:
            if has_stopped := text.add(token, is_end=token in tokenizer.eos):
                break
    has_stopped = has_stopped or (constraint is not None and constraint.finished)
    text.flush()
    finished = time.perf_counter()
    generated = len(text.token_ids)
    timings = Timings(
        prompt_tokens=len(prompt_ids),
        cached_tokens=cached,
        generated_tokens=generated,
        prefill_tokens_per_second=(len(prompt_ids) - cached) / (prefilled - started),
        decode_tokens_per_second=generated / (finished - prefilled),
    )
    finish_reason: FinishReason = "stop" if has_stopped else "length"
    return Completion(text.text, tuple(text.token_ids), finish_reason, engine.name, timings)


def check_limits(max_tokens: int, stop: Sequence[str]) -> None:
    """Refuse what no text can meet.

    Raises:
        InputError: no tokens to generate, or an empty stop string.
    """
    if max_tokens < 1:
        raise InputError(f"{max_tokens} tokens to generate: at least one token must be asked for")
    if "" in stop:
        raise InputError("a stop string is empty")


class TextStream:
    """Generated tokens as text, released as soon as neither a following token nor a stop string can change it."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        stop: Sequence[str],
        on_text: Callable[[str], None] | None,
    ) -> None:
        self.token_ids: list[int] = []
        self.text = ""  # released
        self._tokenizer, self._stop, self._on_text = tokenizer, tuple(stop), on_text
        self._decoded = ""
        # Decoded behind a few tokens that are text already: decoders treat the start of a text differently.
        self._recent = self._tail(prompt_ids)
        self._known = len(self._recent)  # how many of the recent tokens are text already

    def add(self, token: int, *, is_end: bool) -> bool:
        """Take one token; True when the text ends with it."""
        self.token_ids.append(token)
        if is_end:
            return True
        self._recent.append(token)
        piece = self._new_text()
        if piece.endswith("\ufffd"):  # half a character: the next token may complete it
            return False
        self._take(piece)
        ends = [index for string in self._stop if (index := self._decoded.find(string)) >= 0]
        if ends:
            self._decoded = self._decoded[: min(ends)]
            return True
        self._release(len(self._decoded) - self._undecided())
        return False

    def _tail(self, prompt_ids: Sequence[int]) -> list[int]:
        """The last tokens of the prompt, from the beginning of a character on, which has up to four tokens."""
        for size in range(4, 8):
            tail = list(prompt_ids[-size:])
            if not self._tokenizer.decode(tail).startswith("\ufffd"):
                break
        return tail

    def _new_text(self) -> str:
        known = self._tokenizer.decode(self._recent[: self._known])
        text = self._tokenizer.decode(self._recent)
        if text.startswith(known):
            return text[len(known) :]
        return self._tokenizer.decode(self._recent[self._known :])  # stray bytes would spoil the known ones before them

    def _take(self, piece: str) -> None:
        self._decoded += piece
        self._recent = self._recent[self._known :] if piece else self._recent
        self._known = len(self._recent)

    def flush(self) -> None:
        """Release what is left; no token follows."""
        if len(self._recent) > self._known:
            self._take(self._new_text())
        self._release(len(self._decoded))

    def _release(self, length: int) -> None:
        piece = self._decoded[len(self.text) : length]
        if piece:
            self.text += piece
            if self._on_text is not None:
                self._on_text(piece)

    def _undecided(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        prefixes = (string[:size] for string in self._stop for size in range(len(string) - 1, 0, -1))
        return max((len(p) for p in prefixes if self._decoded.endswith(p)), default=0)
