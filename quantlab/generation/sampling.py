"""The sampler: a token is a function of logits, parameters, history, seed and position, and of nothing else.

The arithmetic is the native core's (native/src/engine/sampler.h), whichever engine computed the logits. Batches,
speculation and what was drawn before cannot change a draw, and its bits are the same on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from quantlab import native
from quantlab.errors import InputError


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the next token is drawn. Steps run in the order of the fields, as transformers' logits processors do.

    Attributes:
        logit_bias: added to the logits of token ids; minus infinity forbids a token.
        repetition_penalty: divides positive and multiplies negative logits of tokens that the text holds, the prompt
            included, once each (Keskar et al. 2019, CTRL, arXiv 1909.05858; transformers', llama.cpp's).
        presence_penalty: subtracted from the logits of tokens that were generated; the prompt's do not count
            (OpenAI's).
        frequency_penalty: the same, for each time that a token was generated (OpenAI's).
        penalty_window: how many tokens at the end of the text the three penalties look at (llama.cpp's
            `repeat_last_n`); 0: the whole text.
        temperature: divides logits; 0 takes the most likely token.
        top_k: keeps the k most likely tokens; 0: all.
        top_p: keeps the smallest set with that probability (Holtzman et al. 2020, arXiv 1904.09751).
        min_p: keeps tokens of at least that share of the most likely one's probability (Nguyen et al. 2024, arXiv
            2407.01082).
        seed: the key of the random numbers.

    Among equally likely tokens the smaller id comes first, in every step.

    Raises:
        InputError: fields out of range, all of them named.
    """

    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_window: int = 0
    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))
        checks = {
            "logit bias must be a number below infinity for token ids from 0 on": all(
                token >= 0 and bias < math.inf for token, bias in self.logit_bias.items()
            ),
            "repetition penalty must be greater than 0": 0 < self.repetition_penalty < math.inf,
            "presence penalty must be finite": math.isfinite(self.presence_penalty),
            "frequency penalty must be finite": math.isfinite(self.frequency_penalty),
            "penalty window must be 0 or more": self.penalty_window >= 0,
            "temperature must be 0 or more": 0 <= self.temperature < math.inf,
            "top-k must be 0 or more": self.top_k >= 0,
            "top-p must be above 0 and at most 1": 0 < self.top_p <= 1,
            "min-p must be at least 0 and at most 1": 0 <= self.min_p <= 1,
            "seed must be at least 0 and below 2^64": 0 <= self.seed < 1 << 64,
        }
        if faults := [message for message, holds in checks.items() if not holds]:
            raise InputError("; ".join(faults))


class Sampler:
    """`params` for a vocabulary, with memory that draws share; for one thread at a time.

    Raises:
        InputError: `params.logit_bias` names an id that the vocabulary does not have.
    """

    def __init__(self, params: SamplingParams, vocabulary: int) -> None:
        if outside := [token for token in params.logit_bias if token >= vocabulary]:
            raise InputError(f"logit bias: token id {outside[0]} is outside the vocabulary of {vocabulary}")
        settings = {
            **vars(params),
            "logit_bias": sorted(params.logit_bias.items()),
            "top_k": min(params.top_k, vocabulary),
            "penalty_window": min(params.penalty_window, (1 << 63) - 1),  # beyond any text
        }
        self._sampler = native.Sampler(vocabulary, **settings)

    def draw(self, logits: np.ndarray, history: list[int], position: int, prompt: int = 0) -> int:
        """The token at `position` (0-based, in the whole text).

        The random number is the Philox generator's at counter `position` under key `seed`, so a draw does not depend
        on how many came before it.

        Args:
            logits: fp32 [vocabulary]; minus infinity marks tokens that must not come.
            history: the text so far; read only if a penalty is on.
            prompt: how many tokens of `history`, from its beginning, were not generated.

        Raises:
            InputError: a logit is NaN or infinite, or none is above minus infinity.
        """
        try:
            token: int = self._sampler.draw(logits, history, prompt, position)
        except ValueError as error:
            raise InputError(f"position {position}: {error}") from None
        return token


def sample(logits: np.ndarray, history: Sequence[int], params: SamplingParams, position: int, prompt: int = 0) -> int:
    """One draw, from a sampler of its own; see `Sampler.draw`."""
    values = np.ascontiguousarray(logits, np.float32)
    return Sampler(params, len(values)).draw(values, list(history), position, prompt)
