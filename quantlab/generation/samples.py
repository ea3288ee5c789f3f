"""Several continuations of one prompt, which is computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from quantlab.checkpoint import Tokenizer
from quantlab.errors import InputError
from quantlab.generation.engine import Engine
from quantlab.generation.generator import Completion, complete
from quantlab.generation.sampling import SamplingParams


def complete_many(
    engine: Engine,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    samples: int,
    *,
    max_tokens: int = 128,
    params: SamplingParams | None = None,
    stop: Sequence[str] = (),
) -> list[Completion]:
    """Continue `prompt` `samples` times, each as `complete` does with the seed `params.seed` + its index.

    Raises:
        InputError: no samples, seeds beyond 2^64, or what `complete` refuses.
    """
    return [
        complete(engine, tokenizer, prompt, max_tokens=max_tokens, params=each, stop=stop)
        for each in seeded(params or SamplingParams(), samples)
    ]


def seeded(params: SamplingParams, samples: int) -> list[SamplingParams]:
    """Each sample's: sample i has seed + i.

    Raises:
        InputError: no samples, or seeds beyond 2^64.
    """
    if samples < 1:
        raise InputError(f"{samples} samples: at least one must be asked for")
    return [replace(params, seed=params.seed + index) for index in range(samples)]
