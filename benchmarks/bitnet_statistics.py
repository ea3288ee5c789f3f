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
        low, high = np.quantile(self.draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        return float(low), float(high)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.4f} ({low:.4f} to {high:.4f})"


def weights_of_draws(windows: int, draws: int = DRAWS) -> np.ndarray:
    """How often each window is drawn in each sample with replacement, fp64 [draws, windows]; the same at every call, so
    that figures of the same windows are drawn together.
    """
    random = np.random.default_rng(SEED)
    return random.multinomial(windows, np.full(windows, 1 / windows), size=draws).astype(np.float64)


def gap(nll: np.ndarray, base: np.ndarray, tokens: np.ndarray) -> Drawn:
    """By what share the perplexity of a model exceeds that of `base`.

    Args:
        nll: summed loss of each window, fp64 [seeds, windows]; the mean over seeds counts.
        base: likewise.
        tokens: of each window, fp64 [windows].
    """
    difference = nll.mean(axis=0) - base.mean(axis=0)
    weights = weights_of_draws(len(tokens))
    drawn = np.expm1(weights @ difference / (weights @ tokens))
    return Drawn(float(np.expm1(difference.sum() / tokens.sum())), drawn)


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
