"""The sampler: a token is a function of logits, parameters, history, seed and position, and of nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from quantlab.errors import InputError


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is drawn. Steps run in the order of the fields, as transformers' logits processors do.

    `repetition_penalty` divides positive and multiplies negative logits of tokens seen before (Keskar et al. 2019,
    CTRL, arXiv 1909.05858). `temperature` 0 takes the most likely token. `top_k` keeps the k most likely (0: all),
    `top_p` the smallest set with that probability (Holtzman et al. 2020, arXiv 1904.09751), `min_p` those of at least
    that share of the most likely one's probability (Nguyen et al. 2024, arXiv 2407.01082).
    """

    repetition_penalty: float = 1.0
    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        checks = {
            "repetition penalty must be greater than 0": 0 < self.repetition_penalty < float("inf"),
            "temperature must be 0 or more": 0 <= self.temperature < float("inf"),
            "top-k must be 0 or more": self.top_k >= 0,
            "top-p must be above 0 and at most 1": 0 < self.top_p <= 1,
            "min-p must be at least 0 and at most 1": 0 <= self.min_p <= 1,
            "seed must be at least 0 and below 2^64": 0 <= self.seed < 1 << 64,
        }
        if faults := [message for message, holds in checks.items() if not holds]:
            raise InputError("; ".join(faults))


def sample(logits: np.ndarray, history: Sequence[int], params: SamplingParams, position: int) -> int:
    """Draw the token at `position` (0-based, in the whole text) from `logits`, fp32 [vocabulary].

    Ties go to the smaller id. The random number is the Philox generator's at counter `position` under key `seed`, so a
    draw does not depend on how many came before it.
    """
    scores = _penalized(logits.astype(np.float64), history, params.repetition_penalty)
    if params.temperature == 0:
        return int(scores.argmax())
    candidates = _most_likely(scores, params.top_k)
    weights = np.exp((scores[candidates] - scores[candidates[0]]) / params.temperature)
    kept = _nucleus(weights, params.top_p, params.min_p)
    cumulative = np.cumsum(weights[:kept])
    draw = np.random.Generator(np.random.Philox(key=params.seed, counter=position)).random() * cumulative[-1]
    return int(candidates[min(int(np.searchsorted(cumulative, draw, side="right")), kept - 1)])


def _penalized(scores: np.ndarray, history: Sequence[int], penalty: float) -> np.ndarray:
    if penalty != 1 and len(history):
        seen = np.unique(np.asarray(history, dtype=np.int64))
        scores[seen] = np.where(scores[seen] > 0, scores[seen] / penalty, scores[seen] * penalty)
    return scores


def _most_likely(scores: np.ndarray, top_k: int) -> np.ndarray:
    """Ids by falling score, the smaller id first among equals; only the `top_k` first if it is not 0."""
    if not 0 < top_k < len(scores):
        return np.argsort(-scores, kind="stable")
    threshold = np.partition(scores, -top_k)[-top_k]
    ids = np.flatnonzero(scores >= threshold)
    return ids[np.argsort(-scores[ids], kind="stable")][:top_k]


def _nucleus(weights: np.ndarray, top_p: float, min_p: float) -> int:
    """How many of the falling weights stay; at least one."""
    kept = len(weights)
    if top_p < 1:
        kept = int(np.searchsorted(np.cumsum(weights), top_p * weights.sum(), side="left")) + 1
    above = int(np.count_nonzero(weights >= min_p * weights[0]))
    return max(1, min(kept, above, len(weights)))
