"""Prompt in, text out: tokenize, prefill, decode, stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from quantlab.checkpoint import Tokenizer
from quantlab.errors import InputError
from quantlab.generation.constraints import Constraint
from quantlab.generation.drafters import DRAFT_TOKENS, speculation_for
from quantlab.generation.engine import Engine, OnChunk
from quantlab.generation.log_probabilities import (
    TokenLogprob,
    check_alternatives,
    prefill_with_logprobs,
    token_logprob,
)
from quantlab.generation.sampling import SamplingParams
from quantlab.generation.text_stream import TextStream

FinishReason = Literal["stop", "length"]
OnToken = Callable[[int, TokenLogprob | None], None]


@dataclass(frozen=True)
class Timings:
    """Token counts and speeds; `cached_tokens` of the prompt needed no computing. Of the `drafted_tokens` that were
    verified in passes over several tokens, `accepted_tokens` were those that the sampler drew.
    """

    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    drafted_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(frozen=True)
class Completion:
    """The generated part. `token_ids` holds every generated token, the end token and a stop string's included; `text`
    holds neither. `finish_reason` is "stop" at either or where a constraint is complete, "length" at a limit
    (what a constraint had not completed then is cut, and may be no JSON yet).

    `logprobs` and `prompt_logprobs` have an entry for each generated token and each of the prompt's, where they were
    asked for; that of the prompt's first token is None. `reasoning` is what was written before an answer, where that
    was asked for; see `complete_reasoned`.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    engine: str
    timings: Timings
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    reasoning: str | None = None


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
    speculation: str = "auto",
    draft_model: Engine | None = None,
    draft_tokens: int = DRAFT_TOKENS,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    on_token: OnToken | None = None,
    reading_chunk: int | None = None,
    on_reading: OnChunk | None = None,
) -> Completion:
    """Continue `prompt` by up to `max_tokens` tokens.

    Ctrl-C while it runs, or an exception of a function that it calls, leaves an engine that can go on: its sequence is
    a beginning of prompt and generated tokens.

    Args:
        prompt: a text, or token ids, which are taken as they are.
        stop: strings that end the text; they are not part of it.
        on_text: called with each piece of text as soon as it is certain.
        constraint: what may be generated; used up by the call.
        speculation: "auto", "lookup" or "off"; see `drafters.speculation_for`. The text is the same.
        draft_model: the engine of a smaller model with the same vocabulary.
        draft_tokens: that are verified in one pass, at most.
        logprobs: tell of each generated token its log-probability, and those of so many alternatives.
        prompt_logprobs: the same of the prompt's tokens, all of which are computed then.
        on_token: called with each token that was drawn, before its text, and with what `logprobs` tells of it.
        reading_chunk: tokens of the prompt that are computed at a time.
        on_reading: called behind each such part with how many have been computed, and how many have to be.

    Raises:
        InputError: an empty stop string, a prompt longer than the context, no room to generate, or a constraint that
            allows no token.
    """
    check_limits(max_tokens, stop)
    check_alternatives(logprobs, "logprobs")
    check_alternatives(prompt_logprobs, "prompt logprobs")
    params = params or SamplingParams()
    prompt_ids = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
    speculating = speculation_for(
        speculation, engine, params, len(prompt_ids),
        constraint=constraint, draft_model=draft_model, draft_tokens=draft_tokens,
    )  # fmt: skip
    # Already here: parameters that are wrong must not cost a prefill.
    drawn = engine.decode(params, max_tokens, constraint, speculating)
    started = time.perf_counter()
    cached, told_of_prompt = _prefilled(engine, prompt_ids, prompt_logprobs, tokenizer, reading_chunk, on_reading)
    prefilled = time.perf_counter()
    text = TextStream(tokenizer, prompt_ids, stop, on_text)
    told: list[TokenLogprob] = []
    has_stopped = False
    with drawn:
        for token in drawn:
            if logprobs is not None:
                told.append(token_logprob(drawn.logits, token, logprobs, tokenizer))
            if on_token is not None:
                on_token(token, told[-1] if told else None)
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
        drafted_tokens=0 if speculating is None else speculating.drafted,
        accepted_tokens=0 if speculating is None else speculating.accepted,
    )
    return Completion(
        text=text.text,
        token_ids=tuple(text.token_ids),
        finish_reason="stop" if has_stopped else "length",
        engine=engine.name,
        timings=timings,
        logprobs=None if logprobs is None else tuple(told),
        prompt_logprobs=told_of_prompt,
    )


def check_limits(max_tokens: int, stop: Sequence[str]) -> None:
    """Refuse what no text can meet.

    Raises:
        InputError: no tokens to generate, or an empty stop string.
    """
    if max_tokens < 1:
        raise InputError(f"{max_tokens} tokens to generate: at least one token must be asked for")
    if "" in stop:
        raise InputError("a stop string is empty")


def _prefilled(
    engine: Engine,
    prompt_ids: Sequence[int],
    alternatives: int | None,
    tokenizer: Tokenizer,
    chunk: int | None,
    on_chunk: OnChunk | None,
) -> tuple[int, tuple[TokenLogprob | None, ...] | None]:
    """How many tokens came from the cache, and what was asked about them."""
    if alternatives is None:
        return engine.prefill(prompt_ids, chunk, on_chunk), None
    return 0, prefill_with_logprobs(engine, prompt_ids, alternatives, tokenizer, on_chunk)
