"""What training gained and what fusing left of it: ratios of sums over held-out samples and seeds, with intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from quantlab.search.measuring import student_quantile

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A figure, its standard error, and its two-sided 95 % interval."""

    value: float
    stderr: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4f} ({self.low:.4f} to {self.high:.4f})"


def crossed_ratio(numerators: np.ndarray, denominators: np.ndarray) -> Estimate:
    """The ratio of two sums over the same seeds and samples.

    Its variance is that of the linearized ratio (delta method; Cochran 1977, Sampling Techniques, section 2.11) with
    samples as units plus that with seeds as units: every seed sees every sample, so that the two add up, and what
    belongs to neither is counted twice, which errs on the wide side. A single seed leaves the samples' part. The
    interval is Student's with Satterthwaite's degrees of freedom.

    Args:
        numerators: fp64 [seeds, samples].
        denominators: likewise; their sum is not 0.
    """
    total = float(denominators.sum())
    value = float(numerators.sum()) / total
    residuals = (numerators - value * denominators) / total
    parts = [_of_sum(residuals.sum(axis=0)), _of_sum(residuals.sum(axis=1))]
    known = [(variance, units - 1) for variance, units in parts if units > 1]
    variance = sum(part for part, _ in known)
    if not known:
        return Estimate(value, math.nan, math.nan, math.nan)
    if variance == 0:
        return Estimate(value, 0.0, value, value)
    freedom = variance**2 / sum(part**2 / degrees for part, degrees in known)
    error = math.sqrt(variance)
    reach = quantile(0.5 + CONFIDENCE / 2, freedom) * error
    return Estimate(value, error, value - reach, value + reach)


def _of_sum(units: np.ndarray) -> tuple[float, int]:
    """The variance of a sum whose addends, drawn independently, happen to add up to 0; and their number."""
    count = len(units)
    return (count / (count - 1) * float(np.square(units).sum()) if count > 1 else 0.0), count


def quantile(probability: float, freedom: float) -> float:
    """Student's t, for degrees of freedom rounded down; exact for 1 and 2."""
    degrees = math.floor(freedom + 1e-9)
    if degrees == 1:
        return math.tan(math.pi * (probability - 0.5))
    if degrees == 2:
        return (2 * probability - 1) / math.sqrt(2 * probability * (1 - probability))
    return student_quantile(probability, degrees)


def gain(before: np.ndarray, after: np.ndarray, tokens: np.ndarray) -> Estimate:
    """By how many nats per token the loss fell.

    Args:
        before: summed loss of each sample, fp64 [samples].
        after: likewise, [seeds, samples].
        tokens: that carry loss, [samples].
    """
    return crossed_ratio(before - after, np.broadcast_to(tokens, after.shape))


def recovery(before: np.ndarray, unfused: np.ndarray, fused: np.ndarray) -> Estimate | None:
    """The share of the adapter's gain that the fused model has; None where there was no gain.

    Args:
        before: summed loss of each sample without the adapter, fp64 [samples].
        unfused: with it, [seeds, samples].
        fused: of the fused models, likewise.
    """
    gained = before - unfused
    return crossed_ratio(before - fused, gained) if gained.sum() > 0 else None
