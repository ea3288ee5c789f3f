"""The last digit of a sum of digits, with every intermediate sum written down or without.

Every last digit is as likely as every other one, whatever is left of the question, so that nothing but the whole chain
tells the answer; chance is a tenth. One step is one of ninety sums of two digits.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache

SEED = 901
MEASURED = 400
OPERATIONS = 5  # of a chain that is measured
DIGITS = (1, 9)


@dataclass(frozen=True)
class Chain:
    """A question about 8+5+9, its steps `8+5=13` and `3+9=12`, and the answer, 2."""

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
    digits = [draw.randint(*DIGITS) for _ in range(operations + 1)]
    total, steps = digits[0], []
    for digit in digits[1:]:
        steps.append(f"{total}+{digit}={total + digit}")
        total = (total + digit) % 10
    return Chain(f"What is the last digit of {'+'.join(map(str, digits))}?", tuple(steps), total)
