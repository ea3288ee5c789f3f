"""One turn at the engine: a prompt's continuations, by the one way from prompt to text that all of quantlab has."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from quantlab.checkpoint import Tokenizer
from quantlab.generation.constraints import Constraint
from quantlab.generation.engine import Engine
from quantlab.generation.generator import Completion, Timings, complete
from quantlab.generation.grammars import Grammar
from quantlab.generation.log_probabilities import TokenLogprob, prefill_with_logprobs
from quantlab.generation.reasoned_answer import complete_reasoned
from quantlab.generation.samples import complete_many
from quantlab.generation.sampling import SamplingParams
from quantlab.serving.model_host import ModelHost
from quantlab.serving.turns import Turn

READING_CHUNK = 64  # tokens that the core computes at a time; a client that has gone is noticed between two


@dataclass(frozen=True)
class Piece:
    """A part of a text that is being written: of the sample of that number, with what the tokens since the last piece
    were thought of.
    """

    sample: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TextRequest:
    """What a prompt is continued with; see `complete`.

    Attributes:
        max_tokens: None for as many as the server's default allows.
        cue: the prompt has opened a reasoning, which this text ends; then the grammar holds for what follows.
        is_streamed: emit a `Piece` for each part of a text.
    """

    adapter: str | None
    params: SamplingParams
    max_tokens: int | None
    stop: tuple[str, ...]
    samples: int = 1
    grammar: Grammar | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    cue: str | None = None
    is_streamed: bool = False


def write_texts(
    host: ModelHost,
    turn: Turn,
    prompt_ids: Sequence[int],
    request: TextRequest,
    tokenizer: Tokenizer,
    first: int = 0,
) -> list[Completion]:
    """The samples of a prompt, in order; `first` is the number of the first one's pieces.

    Raises:
        Cancelled: nobody waits for them any more.
        ApiError: the context does not hold the prompt.
        InputError: see `complete`.
    """
    engine = host.engine(request.adapter)
    host.check_length(len(prompt_ids))
    max_tokens = host.settings.max_tokens if request.max_tokens is None else request.max_tokens
    writers = [_Writer(turn, first + number, request.logprobs is not None) for number in range(request.samples)]
    grammar = request.grammar
    make_constraint = None if grammar is None else lambda: host.constraint(grammar, tokenizer)

    def on_token(sample: int, token: int, told: TokenLogprob | None) -> None:
        if turn.cancelled is not None:
            turn.check()
        if told is not None:
            writers[sample].tell(told)

    def on_reading(done: int, total: int) -> None:
        turn.check()

    if grammar is not None and request.cue is not None:
        return [
            _reasoned(
                engine, tokenizer, prompt_ids, host.constraint(grammar, tokenizer), request, request.cue, max_tokens,
                seed=request.params.seed + number, on_text=writers[number].write if request.is_streamed else None,
                on_token=partial(on_token, number), reading_chunk=READING_CHUNK, on_reading=on_reading,
            )
            for number in range(request.samples)
        ]  # fmt: skip
    if request.samples > 1:
        return complete_many(
            engine, tokenizer, prompt_ids, request.samples, max_tokens=max_tokens, params=request.params,
            stop=request.stop, constraint=make_constraint, logprobs=request.logprobs, on_token=on_token,
            on_text=(lambda sample, text: writers[sample].write(text)) if request.is_streamed else None,
            reading_chunk=READING_CHUNK, on_reading=on_reading,
        )  # fmt: skip
    completion = complete(
        engine, tokenizer, prompt_ids, max_tokens=max_tokens, params=request.params, stop=request.stop,
        constraint=make_constraint and make_constraint(), logprobs=request.logprobs,
        prompt_logprobs=request.prompt_logprobs, speculation=host.settings.speculation, draft_model=host.draft_model,
        draft_tokens=host.settings.draft_tokens, on_text=writers[0].write if request.is_streamed else None,
        on_token=lambda token, told: on_token(0, token, told), reading_chunk=READING_CHUNK, on_reading=on_reading,
    )  # fmt: skip
    return [completion]


def _reasoned(
    engine: Engine,
    tokenizer: Tokenizer,
    prompt_ids: Sequence[int],
    constraint: Constraint,
    request: TextRequest,
    cue: str,
    max_tokens: int,
    *,
    seed: int,
    **settings: Any,
) -> Completion:
    """Reasoning, cue and answer as one text."""
    done = complete_reasoned(
        engine, tokenizer, prompt_ids, constraint, cue=cue, reasoning_budget=max_tokens, max_tokens=max_tokens,
        params=replace(request.params, seed=seed), stop=(cue.strip(), *request.stop), **settings,
    )  # fmt: skip
    return replace(done, text=f"{done.reasoning}{cue}{done.text}")


def read_prompt(
    host: ModelHost, turn: Turn, prompt_ids: Sequence[int], request: TextRequest, tokenizer: Tokenizer
) -> Completion:
    """A prompt that is continued by nothing, and what the model thought of its tokens, if that was asked for.

    Raises:
        Cancelled, ApiError, InputError: see `write_texts`.
    """
    engine = host.engine(request.adapter)
    host.check_length(len(prompt_ids))
    started, cached, told = time.perf_counter(), 0, None

    def on_reading(done: int, total: int) -> None:
        turn.check()

    if request.prompt_logprobs is None:
        cached = engine.prefill(prompt_ids, READING_CHUNK, on_reading)
    else:
        told = prefill_with_logprobs(engine, prompt_ids, request.prompt_logprobs, tokenizer, on_reading)
    seconds = time.perf_counter() - started
    speed = (len(prompt_ids) - cached) / seconds
    timings = Timings(len(prompt_ids), cached, 0, speed, 0.0)
    logprobs = None if request.logprobs is None else ()
    return Completion("", (), "length", engine.name, timings, logprobs, told)


class _Writer:
    """Gathers what is told of tokens until the text that they belong to is certain."""

    def __init__(self, turn: Turn, sample: int, tells: bool) -> None:
        self._turn, self._sample = turn, sample
        self._told: list[TokenLogprob] | None = [] if tells else None

    def tell(self, told: TokenLogprob) -> None:
        assert self._told is not None
        self._told.append(told)

    def write(self, text: str) -> None:
        told: tuple[TokenLogprob, ...] = ()
        if self._told:
            told, self._told = tuple(self._told), []
        self._turn.channel.put(Piece(self._sample, text, told))
