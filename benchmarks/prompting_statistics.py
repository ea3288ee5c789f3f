"""Shares of right answers with their intervals, and whether two ways of asking the same questions differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Z = 1.959964  # of a two-sided 95 % interval


@dataclass(frozen=True)
class Share:
    """`right` of `count`."""

    right: int
    count: int

    @property
    def value(self) -> float:
        """From 0 to 1."""
        return self.right / self.count

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval (Wilson 1927), which holds near 0 and 1 as well."""
        n, p = self.count, self.value
        center = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
        reach = Z / (1 + Z * Z / n) * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
        return max(0.0, center - reach), min(1.0, center + reach)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.value:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def share(outcomes: Sequence[bool]) -> Share:
    """Of outcomes, one a question."""
    return Share(sum(outcomes), len(outcomes))


def mcnemar(one: Sequence[bool], other: Sequence[bool]) -> tuple[int, int, float]:
    """Questions that only `one` gets right, that only `other` does, and the exact two-sided p-value that such a split
    is chance (McNemar 1947, by the binomial distribution).
    """
    only_one = sum(a and not b for a, b in zip(one, other, strict=True))
    only_other = sum(b and not a for a, b in zip(one, other, strict=True))
    differing = only_one + only_other
    tail = sum(math.comb(differing, k) for k in range(min(only_one, only_other) + 1))
    return only_one, only_other, min(1.0, 2 * tail / 2**differing)
