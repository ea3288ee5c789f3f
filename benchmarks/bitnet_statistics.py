"""Relative perplexity gaps between pairs of models over the same windows, with bootstrap intervals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from adapter_statistics import CONFIDENCE

DRAWS = 4000
SEED = 0


@dataclass(frozen=True)
class Drawn:
    """A figure of all windows, and of as many windows drawn again and again, fp64 [draws]."""

    value: float
    draws: np.ndarray

    @property
    def interval(self) -> tuple[float, float]:
        """The percentile interval of 95 %."""
        outside = round((1 - CONFIDENCE) / 2 * len(self.draws))
        ascending = np.sort(self.draws)  # numpy's quantile would take the difference of infinite ones
        return float(ascending[outside]), float(ascending[-1 - outside])

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.4f} ({low:.4f} to {high:.4f})"


def weights_of_draws(windows: int, draws: int = DRAWS) -> np.ndarray:
    """How often each window is drawn in each sample with replacement, fp64 [draws, windows]; the same at every call, so
    that figures of the same windows are drawn together.
    """
    random = np.random.default_rng(SEED)
    return random.multinomial(windows, np.full(windows, 1 / windows), size=draws).astype(np.float64)


def seeds_of_draws(seeds: int, stream: int, draws: int = DRAWS) -> np.ndarray:
    """What each seed weighs in the mean of each sample with replacement, fp64 [draws, seeds].

    Means of so few that are drawn again scatter by (seeds - 1) / seeds too little in variance, which is made up for.

    Args:
        stream: seeds of different streams are drawn apart.
    """
    if seeds == 1:
        return np.ones((draws, 1))
    random = np.random.default_rng((SEED, stream))
    drawn = random.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws) / seeds
    widened: np.ndarray = 1 / seeds + (drawn - 1 / seeds) * np.sqrt(seeds / (seeds - 1))
    return widened


def gap(nll: np.ndarray, base: np.ndarray, tokens: np.ndarray, stream: int = 0) -> Drawn:
    """By what share the perplexity of a model exceeds that of `base`.

    Args:
        nll: summed loss of each window, fp64 [seeds, windows]; the mean over seeds counts.
        base: likewise, of the same seeds.
        tokens: of each window, fp64 [windows].
        stream: of `seeds_of_draws`.
    """
    difference = nll - base
    windows, seeds = weights_of_draws(len(tokens)), seeds_of_draws(len(difference), stream)
    drawn = np.expm1(((seeds @ difference) * windows).sum(axis=1) / (windows @ tokens))
    return Drawn(float(np.expm1(difference.mean(axis=0).sum() / tokens.sum())), drawn)


def gaps_by_seed(nll: np.ndarray, base: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """The same of each seed alone, fp64 [seeds]."""
    found: np.ndarray = np.expm1((nll - base).sum(axis=1) / tokens.sum())
    return found


def ratio(one: Drawn, other: Drawn) -> Drawn:
    """Of two gaps that were drawn together; infinite where the other is none."""
    with np.errstate(divide="ignore", invalid="ignore"):
        draws = np.where(other.draws > 0, one.draws / other.draws, np.inf)
    return Drawn(one.value / other.value if other.value > 0 else np.inf, draws)


def slope(sizes: list[float], gaps: list[Drawn]) -> Drawn:
    """By how much the gap changes when a model has ten times as many parameters: least squares over log10(size)."""
    x = np.log10(sizes) - np.mean(np.log10(sizes))
    values = np.array([one.value for one in gaps])
    draws = np.array([one.draws for one in gaps])
    return Drawn(float(x @ values / (x @ x)), x @ draws / (x @ x))


def share_shrinking(gaps: list[Drawn]) -> float:
    """In how many of the draws every larger model has a smaller gap."""
    draws = np.array([one.draws for one in gaps])
    return float((np.diff(draws, axis=0) < 0).all(axis=0).mean())
