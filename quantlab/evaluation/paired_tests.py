"""Tests of two templates on the same questions: McNemar's, and Holm's correction for several of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

EXACT = 1000  # discordant pairs up to which the binomial distribution itself is summed


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided p that neither of two is right more often, from the questions that only one of them got right
    (McNemar 1947, Psychometrika 12:153).

    Exact by the binomial distribution up to 1000 such questions, and beyond by chi squared with Edwards' correction.
    """
    discordant = only_a + only_b
    if discordant == 0:
        return 1.0
    if discordant <= EXACT:
        tail = sum(math.comb(discordant, count) for count in range(min(only_a, only_b) + 1))
        return min(1.0, 2 * tail / 2**discordant)
    chi = max(0, abs(only_a - only_b) - 1) / math.sqrt(discordant)
    return math.erfc(chi / math.sqrt(2))


def holm(values: Sequence[float]) -> list[float]:
    """The p of each test if that many are made (Holm 1979, Scand. J. Statist. 6:65), in the order given."""
    corrected = [0.0] * len(values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=lambda index: values[index])):
        largest = max(largest, min(1.0, (len(values) - rank) * values[index]))
        corrected[index] = largest
    return corrected
