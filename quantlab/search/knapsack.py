"""One choice for each item, the least total cost within a budget of bytes: a multiple-choice knapsack."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

STATES = 200_000  # budgets that a table tells apart
POINTS = 4096  # of a frontier


@dataclass(frozen=True)
class Choice:
    """What an item takes of the budget, and what it costs to give it no more."""

    bytes: int
    cost: float


class Knapsack:
    """The best choices for every budget at once, by dynamic programming (Dudzinski and Walukiewicz 1987).

    Exact where the span between the least and the most bytes is at most `states` times the greatest common divisor of
    all differences, as it is where shapes are round; otherwise differences are rounded up to whole steps, which never
    breaks the budget and wastes at most one step an item. Of equally good choices the smaller wins.

    Attributes:
        least: bytes of the smallest choices.
        most: bytes of the largest.
        step: bytes between the budgets that are told apart.
    """

    def __init__(self, items: Sequence[Sequence[Choice]], states: int = STATES) -> None:
        assert items, "there must be something to choose"
        assert all(items), "every item needs a choice"
        self._items = items
        smallest = [min(choice.bytes for choice in choices) for choices in items]
        self.least = sum(smallest)
        self.most = sum(max(choice.bytes for choice in choices) for choices in items)
        extras = [[choice.bytes - floor for choice in choices] for choices, floor in zip(items, smallest, strict=True)]
        divisor = math.gcd(*(extra for row in extras for extra in row)) or 1
        span = (self.most - self.least) // divisor
        self.step = divisor * max(1, -(-span // states))
        self._steps = [[-(-extra // self.step) for extra in row] for row in extras]
        self._solve(sum(map(max, self._steps)) + 1)

    def _solve(self, states: int) -> None:
        """`_best[s]` is the least cost within s steps above the least; `_picks[i][s]` item i's choice there."""
        best, self._picks = np.zeros(states), []
        for choices, steps in zip(self._items, self._steps, strict=True):
            improved, pick = np.full(states, np.inf), np.zeros(states, np.uint8)
            for index in sorted(range(len(choices)), key=lambda i: (choices[i].bytes, choices[i].cost)):
                shifted = np.full(states, np.inf)
                shifted[steps[index] :] = best[: states - steps[index]] + choices[index].cost
                better = shifted < improved
                improved[better], pick[better] = shifted[better], index
            best = improved
            self._picks.append(pick)
        self._best = best

    def solve(self, budget: int) -> tuple[int, ...]:
        """The index of each item's choice, in at most `budget` bytes.

        Raises:
            ValueError: the budget is below `least`.
        """
        if budget < self.least:
            raise ValueError(f"{budget} bytes: the smallest choices take {self.least}")
        return self._chosen(min((budget - self.least) // self.step, len(self._best) - 1))

    def _chosen(self, state: int) -> tuple[int, ...]:
        chosen = []
        for pick, steps in zip(reversed(self._picks), reversed(self._steps), strict=True):
            index = int(pick[state])
            chosen.append(index)
            state -= steps[index]
        return tuple(reversed(chosen))

    def bytes_of(self, chosen: Sequence[int]) -> int:
        """What the chosen take."""
        return sum(choices[index].bytes for choices, index in zip(self._items, chosen, strict=True))

    def cost_of(self, chosen: Sequence[int]) -> float:
        """What the chosen cost."""
        return math.fsum(choices[index].cost for choices, index in zip(self._items, chosen, strict=True))

    def frontier(self, points: int = POINTS) -> Iterator[tuple[int, ...]]:
        """Choices that no smaller ones match, from the smallest to the cheapest; where there are more than `points`,
        about so many of them, evenly, both ends included.
        """
        better = np.flatnonzero(np.diff(self._best, prepend=np.inf) < 0)
        for state in better[np.unique(np.linspace(0, len(better) - 1, min(points, len(better))).astype(int))]:
            yield self._chosen(int(state))
