"""What drafters have in common: guesses at the next tokens, which the model verifies many at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Offer:
    """A drafter's guess at hand: `grade` says how good such guesses are, as an index of `Drafter.odds`; it has `most`
    tokens at most.
    """

    grade: int
    most: int


class Drafter(Protocol):
    """Guesses how one growing text goes on; wrong guesses cost time and change no output.

    Attributes:
        odds: for each grade, how probable it is at first that the next token of a guess is right.
    """

    odds: tuple[float, ...]

    def offer(self, text: list[int]) -> Offer | None:
        """Whether there is a guess, and how good it is. `text` goes on from that of the last call."""

    def draft(self, text: list[int], count: int) -> list[int]:
        """The guess that was offered for this text, of 1 to `count` tokens."""
