"""What a model thought of tokens: their log-probabilities under its own distribution, and the likeliest alternatives.

The distribution is the softmax of the model's logits, before biases, penalties, constraints, temperature and what cuts
it: a property of the model, not of how tokens were drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from quantlab.checkpoint import Tokenizer
from quantlab.divergence import negative_log_likelihood
from quantlab.errors import InputError
from quantlab.generation.engine import Engine, OnChunk

MOST_ALTERNATIVES = 1000


@dataclass(frozen=True)
class Alternative:
    """A token as the vocabulary spells it, and its ln p."""

    token_id: int
    token: str
    logprob: float


@dataclass(frozen=True)
class TokenLogprob(Alternative):
    """A token of a text, and the likeliest ones in its place, the likeliest first."""

    top: tuple[Alternative, ...]


def check_alternatives(count: int | None, name: str) -> None:
    """Refuse a number that cannot be listed.

    Raises:
        InputError: it is negative, or above 1000.
    """
    if count is not None and not 0 <= count <= MOST_ALTERNATIVES:
        raise InputError(f"{name} {count}: 0 to {MOST_ALTERNATIVES} alternatives can be told")


def token_logprob(logits: np.ndarray, token: int, alternatives: int, tokenizer: Tokenizer) -> TokenLogprob:
    """Of one token, from the logits, fp32 [vocabulary], that it was drawn from. Of equals the smaller id is first."""
    logprob = -float(negative_log_likelihood(logits[None], np.array([token]))[0])
    total = float(logits[token]) - logprob  # ln of the sum of exponentials
    logprob = float(logits[token]) - total  # rounded as those of the alternatives are: clients compare them
    most = min(alternatives, len(logits))
    top: list[Alternative] = []
    if most:
        border = np.partition(logits, len(logits) - most)[len(logits) - most]
        best = np.flatnonzero(logits >= border)
        best = best[np.argsort(-logits[best], kind="stable")][:most]
        top = [Alternative(int(i), _spelling(tokenizer, int(i)), float(logits[i]) - total) for i in best]
    return TokenLogprob(token, _spelling(tokenizer, token), logprob, tuple(top))


def prefill_with_logprobs(
    engine: Engine,
    prompt_ids: Sequence[int],
    alternatives: int,
    tokenizer: Tokenizer,
    on_chunk: OnChunk | None = None,
) -> tuple[TokenLogprob | None, ...]:
    """Make the prompt the engine's sequence, computing all of it: a cache holds no logits.

    Args:
        on_chunk: called behind each part with how many tokens have been computed, and how many have to be.

    Returns:
        One for each token; None for the first, which nothing comes before.

    Raises:
        InputError: see `Engine.prefill`.
    """
    rows = _rows(engine, prompt_ids, on_chunk)
    next_ones = (
        token_logprob(row, int(token), alternatives, tokenizer)
        for row, token in zip(rows, prompt_ids[1:], strict=False)
    )
    found = (None, *next_ones)
    for _ in rows:  # the last token's: zip has not asked for it
        pass
    return found


def _rows(engine: Engine, prompt_ids: Sequence[int], on_chunk: OnChunk | None) -> Iterator[np.ndarray]:
    for part in engine.prefill_all(prompt_ids):
        yield from part
        if on_chunk is not None:
            on_chunk(engine.position, len(prompt_ids))


def _spelling(tokenizer: Tokenizer, token: int) -> str:
    return tokenizer.backend.id_to_token(token) or ""
