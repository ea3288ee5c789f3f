"""Several continuations of one prompt, which is computed once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from quantlab.adapters.combine import Source as AdapterSource
from quantlab.checkpoint import Tokenizer, load_tokenizer
from quantlab.errors import InputError
from quantlab.generation.constraints import Constraint
from quantlab.generation.drawing import Drawing
from quantlab.generation.engine import Engine, OnChunk
from quantlab.generation.engines import open_engine
from quantlab.generation.generator import Completion, FinishReason, OnToken, Timings, check_limits, complete
from quantlab.generation.grammar_constraint import constraints_of
from quantlab.generation.grammars import Grammar
from quantlab.generation.log_probabilities import TokenLogprob, check_alternatives, token_logprob
from quantlab.generation.prompt_cache import PromptCache
from quantlab.generation.sampling import SamplingParams
from quantlab.generation.text_stream import TextStream

MOST_SAMPLES = 1 << 16  # the core's limit of branches
OnSampleText = Callable[[int, str], None]
OnSampleToken = Callable[[int, int, TokenLogprob | None], None]


@dataclass(frozen=True)
class Sample:
    """One of several continuations."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason


@dataclass(frozen=True, kw_only=True)
class Samples(Completion):
    """The first of several completions, with all of them; `timings` are of all together."""

    samples: tuple[Sample, ...]


def generate_many(
    model: str | Path,
    prompt: str | Sequence[int],
    samples: int,
    *,
    max_tokens: int = 128,
    params: SamplingParams | None = None,
    stop: Sequence[str] = (),
    engine: str = "auto",
    threads: int | None = None,
    adapters: Sequence[AdapterSource] | None = None,
    prompt_cache: PromptCache | None = None,
    grammar: Grammar | None = None,
    on_token: OnSampleToken | None = None,
) -> Samples:
    """Load `model` and continue `prompt` `samples` times; see `complete_many`, and `generate` for other arguments.

    Raises:
        InputError: the model or an adapter cannot be loaded, or what `complete_many` refuses.
    """
    _check_count(samples)
    tokenizer = load_tokenizer(model)
    opened = open_engine(model, engine, threads=threads, adapters=adapters, prompt_cache=prompt_cache)
    constraint = None if grammar is None else constraints_of(grammar, tokenizer, opened.vocabulary)
    found = complete_many(
        opened, tokenizer, prompt, samples,
        max_tokens=max_tokens, params=params, stop=stop, constraint=constraint, on_token=on_token,
    )  # fmt: skip
    first, seconds = found[0], [each.timings.generated_tokens / each.timings.decode_tokens_per_second for each in found]
    generated = sum(each.timings.generated_tokens for each in found)
    taken = max(seconds) if opened.has_branches else sum(seconds)
    timings = replace(first.timings, generated_tokens=generated, decode_tokens_per_second=generated / taken)
    return Samples(
        **{**{name: getattr(first, name) for name in vars(first)}, "timings": timings},
        samples=tuple(Sample(each.text, each.token_ids, each.finish_reason) for each in found),
    )


def complete_many(
    engine: Engine,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    samples: int,
    *,
    max_tokens: int = 128,
    params: SamplingParams | None = None,
    stop: Sequence[str] = (),
    constraint: Callable[[], Constraint] | None = None,
    logprobs: int | None = None,
    on_text: OnSampleText | None = None,
    on_token: OnSampleToken | None = None,
    reading_chunk: int | None = None,
    on_reading: OnChunk | None = None,
) -> list[Completion]:
    """Continue `prompt` `samples` times; sample i is what `complete` gives with the seed `params.seed` + i.

    An engine with branches, the native one, computes a token of each sample at a time: weights are read once for all of
    them, and the prompt's cache is one for all. Others compute one sample after another, of which all but the first
    find the prompt cached. Nothing is drafted ahead.

    Args:
        prompt: a text, or token ids, which are taken as they are.
        constraint: makes one for each sample.
        on_text, on_token: as of `complete`, behind the sample's number.
        logprobs, reading_chunk, on_reading: see `complete`.

    Returns:
        The samples in order. With branches they share the time of the prefill, and a sample's decoding speed is its
        number of tokens by the time until its last one.

    Raises:
        InputError: no samples or more than 65,536, seeds beyond 2^64, what `complete` refuses, or too little memory for
            their caches.
    """
    _check_count(samples)
    check_limits(max_tokens, stop)
    check_alternatives(logprobs, "logprobs")
    params = params or SamplingParams()
    seeded = [replace(params, seed=params.seed + index) for index in range(samples)]
    if samples > 1 and engine.has_branches:
        prompt_ids = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        begun = [
            _Sample(
                each,
                engine.vocabulary,
                constraint and constraint(),
                logprobs,
                on_text and partial(on_text, index),
                on_token and partial(on_token, index),
            )
            for index, each in enumerate(seeded)
        ]
        reading = partial(engine.prefill, prompt_ids, reading_chunk, on_reading)
        return _complete_together(engine, tokenizer, prompt_ids, reading, begun, max_tokens, stop)
    return [
        complete(
            engine,
            tokenizer,
            prompt,
            max_tokens=max_tokens,
            params=each,
            stop=stop,
            constraint=constraint and constraint(),
            speculation="off",
            logprobs=logprobs,
            on_text=on_text and partial(on_text, index),
            on_token=on_token and partial(on_token, index),
            reading_chunk=reading_chunk,
            on_reading=on_reading,
        )
        for index, each in enumerate(seeded)
    ]


def _check_count(samples: int) -> None:
    if samples < 1:
        raise InputError(f"{samples} samples: at least one must be asked for")
    if samples > MOST_SAMPLES:
        raise InputError(f"{samples} samples: at most {MOST_SAMPLES} can be drawn at a time")


class _Sample:
    """One continuation under way.

    Attributes:
        text: the prompt and what was drawn.
    """

    def __init__(
        self,
        params: SamplingParams,
        vocabulary: int,
        constraint: Constraint | None,
        logprobs: int | None,
        on_text: Callable[[str], None] | None,
        on_token: OnToken | None,
    ) -> None:
        self._logprobs, self._on_text, self._on_token = logprobs, on_text, on_token
        self._told: list[TokenLogprob] = []
        self._drawing = Drawing(params, vocabulary, constraint)
        self.text: list[int] = []

    def begin(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: Sequence[str]) -> None:
        self.text, self._prompt, self._ends = list(prompt_ids), len(prompt_ids), tokenizer.eos
        self._tokenizer = tokenizer
        self._stream, self._has_stopped = TextStream(tokenizer, prompt_ids, stop, self._on_text), False
        self._begun = time.perf_counter()

    def draw(self, logits: np.ndarray) -> bool:
        """Draw the next token, from the logits behind the text; True when the text stops with it."""
        token = self._drawing.draw(logits, self.text, self._prompt)
        self.text.append(token)
        if self._logprobs is not None:
            self._told.append(token_logprob(logits, token, self._logprobs, self._tokenizer))
        if self._on_token is not None:
            self._on_token(token, self._told[-1] if self._told else None)
        self._has_stopped = self._stream.add(token, is_end=token in self._ends) or self._drawing.finished
        self._drawn = time.perf_counter()
        return self._has_stopped

    def completion(self, engine: str, cached: int, prefill_seconds: float) -> Completion:
        """What it has become."""
        self._stream.flush()
        token_ids = tuple(self._stream.token_ids)
        timings = Timings(
            prompt_tokens=self._prompt,
            cached_tokens=cached,
            generated_tokens=len(token_ids),
            prefill_tokens_per_second=(self._prompt - cached) / prefill_seconds,
            decode_tokens_per_second=len(token_ids) / (self._drawn - self._begun),
        )
        return Completion(
            text=self._stream.text,
            token_ids=token_ids,
            finish_reason="stop" if self._has_stopped else "length",
            engine=engine,
            timings=timings,
            logprobs=None if self._logprobs is None else tuple(self._told),
        )


def _complete_together(
    engine: Engine,
    tokenizer: Tokenizer,
    prompt_ids: Sequence[int],
    read: Callable[[], int],
    samples: Sequence[_Sample],
    max_tokens: int,
    stop: Sequence[str],
) -> list[Completion]:
    """A token of each sample that has not ended, until all have. `read` makes the prompt the sequence, as `prefill`."""
    started = time.perf_counter()
    cached = read()
    prefill_seconds = time.perf_counter() - started
    for sample in samples:
        sample.begin(tokenizer, prompt_ids, stop)
    end = min(len(prompt_ids) + max_tokens, engine.context + 1)
    live = [i for i, sample in enumerate(samples) if not sample.draw(engine.logits())]
    room = end - 1 - len(prompt_ids)  # the last token is drawn, not computed with
    if live and room > 0:
        with engine.branches(len(samples), room) as branches:
            while live and len(samples[live[0]].text) < end:
                rows = branches.append(live, [samples[i].text[-1] for i in live])
                live = [i for i, row in zip(live, rows, strict=True) if not samples[i].draw(row)]
    return [sample.completion(engine.name, cached, prefill_seconds) for sample in samples]
