"""Chains of additions and subtractions from 0 to 20, with every intermediate result written down or without."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache

SEED = 901
MEASURED = 400
OPERATIONS = 5  # of a chain that is measured
LEAST, MOST = 0, 20  # of all intermediate results
STARTS = (1, 20)
OPERANDS = (1, 9)


@dataclass(frozen=True)
class Chain:
    """A question such as `What is 12+7-3?`, its steps `12+7=19` and `19-3=16`, and the answer."""

    question: str
    steps: tuple[str, ...]
    answer: int

    @property
    def scratchpad(self) -> str:
        """The steps, and the answer behind the phrase that extractors look for."""
        return f"{'; '.join(self.steps)}. The answer is {self.answer}."


@cache
def measured_chains() -> tuple[Chain, ...]:
    """Different ones to measure on."""
    draw, found = random.Random(SEED), dict[Chain, None]()
    while len(found) < MEASURED:
        found[_drawn(draw, OPERATIONS)] = None
    return tuple(found)


def draw_chain(draw: random.Random, operations: int = OPERATIONS) -> Chain:
    """One to train on: none that is measured."""
    measured = set(measured_chains())
    return next(chain for chain in iter(lambda: _drawn(draw, operations), None) if chain not in measured)


def _drawn(draw: random.Random, operations: int) -> Chain:
    """An operand that would lead out of the range is drawn again, with its sign."""
    total = draw.randint(*STARTS)
    expression, steps = str(total), []
    for _ in range(operations):
        signed = 0
        while not signed or not LEAST <= total + signed <= MOST:
            signed = draw.choice((1, -1)) * draw.randint(*OPERANDS)
        steps.append(f"{total}{signed:+d}={total + signed}")
        expression, total = f"{expression}{signed:+d}", total + signed
    return Chain(f"What is {expression}?", tuple(steps), total)
