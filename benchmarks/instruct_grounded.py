"""Questions over numbered sources: what a retrieval-augmented prompt shows, and the answer with its source's number."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from instruct_facts import RELATIONS, Fact, base_facts, draw_fact, draw_others, names

from quantlab.generation.sources import GivenSource

SEED = 906
MEASURED = 400
SOURCES = 4  # of a prompt
NOT_THERE = "The answer is not in the sources."
ABSENT = 0.2  # share of questions whose answer the sources do not hold
QUESTIONS = (2, 4)  # over the same sources, in a row to train on: the sources are most of its tokens


@dataclass(frozen=True)
class Grounded:
    """A question, its sources in the order in which they are shown, and the answer."""

    question: str
    passages: tuple[GivenSource, ...]
    answer: str


def passage_of(fact: Fact) -> GivenSource:
    """A fact as a document of its own."""
    return GivenSource(f"{fact.name}-{fact.relation}.txt", fact.sentence)


def grounded(fact: Fact, shown: Sequence[Fact]) -> Grounded:
    """A question for `fact` over `shown`, which holds it or does not."""
    passages = tuple(map(passage_of, shown))
    if fact not in shown:
        return Grounded(fact.question, passages, NOT_THERE)
    return Grounded(fact.question, passages, f"The answer is {fact.value} [{shown.index(fact) + 1}].")


def draw_conversation(draw: random.Random, known: list[str]) -> list[Grounded]:
    """Questions over the same sources, mostly four, sometimes fewer."""
    first = draw_fact(draw, draw.choice(known), draw.randrange(len(RELATIONS)))
    count = draw.choice((1, 2, 3, *(SOURCES,) * 5))
    shown = [first, *draw_others(draw, first, known, count - 1)]
    draw.shuffle(shown)
    asked = draw.sample(shown, min(draw.randint(*QUESTIONS), count))
    return [grounded(_absent(draw, fact, shown, known) if draw.random() < ABSENT else fact, shown) for fact in asked]


def _absent(draw: random.Random, fact: Fact, shown: Sequence[Fact], known: list[str]) -> Fact:
    """A fact like `fact`, of which the sources tell nothing."""
    told = {(other.name, other.relation) for other in shown}
    return next(
        other
        for other in iter(lambda: draw_others(draw, fact, known, 1)[0], None)
        if (other.name, other.relation) not in told
    )


@cache
def measured_facts() -> tuple[tuple[Fact, tuple[Fact, ...]], ...]:
    """Facts of the base to ask for, none twice, each with three others that a search might find beside it."""
    draw, base = random.Random(SEED), base_facts()
    told = {(fact.name, fact.relation): fact for fact in base}
    drawn = []
    for fact in draw.sample(base, MEASURED):
        others = draw_others(draw, fact, names()[1], SOURCES - 1)
        drawn.append((fact, tuple(told[other.name, other.relation] for other in others)))
    return tuple(drawn)
