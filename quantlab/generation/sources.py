"""Passages in a prompt: numbered by rank, within a budget of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from quantlab.errors import InputError
from quantlab.generation.answers import NOT_IN_SOURCES

INSTRUCTION = (
    "Answer from the numbered sources below and name the ones you use, like [1]. "
    f'If they do not hold the answer, say "{NOT_IN_SOURCES}".'
)
NO_SOURCE = "(no source was found)"
LEAST_TOKENS = 16  # of a passage that is cut: less would say nothing


class Source(Protocol):
    """A passage and where it comes from."""

    @property
    def source(self) -> str:
        """A file or another name."""

    @property
    def text(self) -> str:
        """What it says."""


@dataclass(frozen=True)
class GivenSource:
    """A passage that a user or a task gives, not an index."""

    source: str
    text: str


def numbered_sources(passages: Sequence[Source]) -> str:
    """The instruction, and the passages by number from 1."""
    listed = "\n".join(f"[{number}] {passage.text.strip()}" for number, passage in enumerate(passages, 1))
    return f"{INSTRUCTION}\n\n{listed or NO_SOURCE}"


def within_budget(
    passages: Sequence[Source], budget: int, count_tokens: Callable[[str], int]
) -> tuple[GivenSource, ...]:
    """The first passages that have up to `budget` tokens together, the last one cut between words if need be.

    Raises:
        InputError: the budget holds not even the beginning of the first.
    """
    kept: list[GivenSource] = []
    left = budget
    for passage in passages:
        text = _cut(passage.text.strip(), left, count_tokens)
        if not text:
            break
        kept.append(GivenSource(passage.source, text))
        left -= count_tokens(text)
        if len(text) < len(passage.text.strip()):
            break
    if passages and not kept:
        raise InputError(f"{budget} tokens for passages hold not even the beginning of the first; allow more")
    return tuple(kept)


def _cut(text: str, budget: int, count_tokens: Callable[[str], int]) -> str:
    """As many whole words of `text` as `budget` tokens hold; empty where these are too few to say anything."""
    if count_tokens(text) <= budget:
        return text
    ends = [place for place in range(1, len(text)) if text[place].isspace() and not text[place - 1].isspace()]
    low, high = 0, len(ends)  # the first `low` word ends fit, `high` + 1 do not
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if count_tokens(text[: ends[middle - 1]]) <= budget else (low, middle - 1)
    beginning = text[: ends[low - 1]] if low else ""
    return beginning if count_tokens(beginning) >= LEAST_TOKENS else ""
