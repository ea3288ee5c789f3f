"""Drafts by prompt lookup: where the last tokens occurred before, what followed them then may follow again.

As in Saxena's prompt lookup decoding (2023) and llama.cpp's lookup; the longest match counts.
"""

from __future__ import annotations

from quantlab.generation.drafts import Offer

LONGEST = 16  # a match is not followed farther back
CANDIDATES = 8  # places that are compared
MOST = 64  # tokens of a draft


class PromptLookup:
    """See `Drafter`. Looks into prompt and generated text for at least the last two tokens. Of the last places where
    they occurred, the one with the longest match is taken, of equals the last. The index grows with the text.

    Grades are by the length of the match: 2, 3, 4 to 7, 8 to 15, 16 and more tokens.
    """

    odds: tuple[float, ...] = (0.2, 0.4, 0.7, 0.9, 0.95)

    def __init__(self) -> None:
        self._last: dict[tuple[int, int], int] = {}  # two tokens -> the place behind their last occurrence
        self._previous = [0, 0]  # place -> that behind the occurrence before; 0: none
        self._found = 0

    def offer(self, text: list[int]) -> Offer | None:
        """See `Drafter`."""
        self._extend(text)
        place = self._last.get((text[-2], text[-1]), 0) if len(text) > 1 else 0
        if not place:
            return None
        longest = 0
        for _ in range(CANDIDATES):
            length = _match_length(text, place)
            if length > longest:
                longest, self._found = length, place
            place = self._previous[place]
            if not place or longest == LONGEST:
                break
        return Offer(_grade(longest), min(MOST, len(text) - self._found))

    def draft(self, text: list[int], count: int) -> list[int]:
        """See `Drafter`."""
        return text[self._found : self._found + count]

    def _extend(self, text: list[int]) -> None:
        """Index the pairs that something follows."""
        last, previous = self._last, self._previous
        for place in range(len(previous), len(text)):
            pair = text[place - 2], text[place - 1]
            previous.append(last.get(pair, 0))
            last[pair] = place


def _match_length(text: list[int], place: int) -> int:
    """How many tokens before `place` are the last ones of the text; two are known to be."""
    length, most = 2, min(place, LONGEST)
    while length < most and text[place - length - 1] == text[-length - 1]:
        length += 1
    return length


def _grade(length: int) -> int:
    return length - 2 if length < 4 else length.bit_length() - 1
