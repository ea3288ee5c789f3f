"""When to speculate: whether a draft of some length is worth a pass is measured while a text is written.

A pass over a drafted text gives the logits behind each of its tokens at once. The sampler draws from them as if they
had come one by one; a draft token that is the one drawn needs no pass of its own. What is drawn depends on logits and
positions alone, and the native engine's logits do not depend on how many tokens come at once: so drafts, and with them
everything that is decided here, change the time and never a token, at any temperature.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from quantlab.generation.drafts import Drafter

LENGTHS = (1, 3, 7, 15)  # of drafts: 2, 4, 8 and 16 tokens a pass
FIRST_COSTS = (1.2, 1.6, 2.4, 4.0)  # of passes with such drafts, in plain steps, before one was measured
ALLOWANCE = 0.005  # of the time may be lost by drafts that come to nothing
FIRST_CREDIT = 1.0  # plain steps that may be lost to begin with
MOST_CREDIT = 8.0  # plain steps: what copying saved is not to be wasted on prose
PRIOR_WEIGHT = 2.0  # draft tokens that the first odds count as
MEMORY = 0.9  # what earlier drafts of a grade count for, each time
LONGEST_REST = 3  # looks that find nothing double the tokens until the next, so many times
FORGETTING = 256  # tokens without a draft after which what is known of a grade counts half


class Speculation:
    """Decides on drafts for one text, and counts.

    `credit`, in plain steps, is what may be lost: it begins with one, grows by a two-hundredth each step and by what
    drafts save, and no draft is tried that could cost more. So the time lost stays within a two-hundredth and one step,
    as far as past passes tell of the next.

    Looking for drafts takes time too, most of all where a step takes a quarter of a millisecond. After looks that found
    nothing it rests, for up to eight tokens.

    Attributes:
        drafted, accepted: tokens.
        wake: tokens of the text before which it need not be asked.

    Args:
        always: draft whenever there is an offer, whether it pays or not.
        most: tokens of a draft.
        clock: seconds.
    """

    def __init__(
        self,
        drafters: Sequence[Drafter],
        *,
        most: int = LENGTHS[-1],
        always: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._records = [_Record(drafter) for drafter in drafters]
        self._always, self._most, self._clock = always, most, clock
        self._step = 0.0  # seconds of a plain one
        self._credit = FIRST_CREDIT
        self._needed = 0.0  # credit without which nothing can be tried
        self._started = 0.0
        self._pending: tuple[_Record, int, int] | None = None  # whose draft is verified, its grade and length
        self._misses, self._looked = 0, 0
        self.drafted, self.accepted = 0, 0
        self.wake = 0

    def draft(self, text: list[int], room: int) -> list[int]:
        """A draft of at most `room` tokens, or none. A pass over the last token and the draft has to follow, and
        `passed`; after a draft `settle`, too.
        """
        self._started = self._clock()
        rested = len(text) - self._looked if self._looked else 0
        self._credit = min(self._credit + ALLOWANCE * rested, MOST_CREDIT)
        self._looked = len(text)
        self._pending = None
        draft: list[int] = []
        if room > 0 and self._step and (self._credit >= self._needed or self._always):
            best = self._best(text, room)
            if best is not None:
                record, grade, length = best
                draft = record.drafter.draft(text, length)
                self._pending = (record, grade, len(draft)) if draft else None
        if not draft and self._step:
            self._rest(len(text))
        return draft

    def _best(self, text: list[int], room: int) -> tuple[_Record, int, int] | None:
        """The offer that promises most: from whom, its grade, the length to take of it."""
        best, best_speed = None, 0.0
        for record in self._records:
            offer = record.drafter.offer(text)
            chosen = None if offer is None else self._chosen(record, offer.grade, len(text))
            if offer is not None and chosen is not None and chosen.speed > best_speed:
                best_speed = chosen.speed
                best = record, offer.grade, min(chosen.length, offer.most, room, self._most)
        return best

    def _rest(self, position: int) -> None:
        self._misses = min(self._misses + 1, LONGEST_REST)
        self.wake = 0 if self._always else position + (1 << self._misses)

    def _chosen(self, record: _Record, grade: int, position: int) -> _Choice | None:
        if self._always:
            return _Choice(1.0, self._most, 0.0)
        return next((choice for choice in record.plan(grade, position) if choice.loss <= self._credit), None)

    def passed(self) -> None:
        """The pass is over."""
        seconds = self._clock() - self._started
        if self._pending is None:
            if not self._step:
                self._step = seconds
            self._step += 0.1 * (min(seconds, 2 * self._step) - self._step)
        elif self._step:
            record, _, length = self._pending
            record.take_time(length, seconds / self._step)

    def settle(self, accepted: int, position: int) -> None:
        """So many tokens of the last draft were drawn."""
        if self._pending is None:
            return
        record, grade, length = self._pending
        self._pending = None
        self.drafted += length
        self.accepted += accepted
        record.take_outcome(grade, length, accepted, position)
        if accepted:
            self._misses = 0
        self._credit = min(self._credit + 1 + accepted - record.costs[_width(length)], MOST_CREDIT)
        self._needed = min(min(each.costs) for each in self._records) - 1


class _Choice(NamedTuple):
    """Drafts of `length` would make this many times as many tokens a second as plain steps; if no token of one is
    right, `loss` plain steps are lost.
    """

    speed: float
    length: int
    loss: float


class _Record:
    """What is known of one drafter: costs of passes by length of the draft, and how often each grade was right."""

    def __init__(self, drafter: Drafter) -> None:
        self.drafter = drafter
        self.costs = list(FIRST_COSTS)  # in plain steps, drafting included
        self._measured = [False] * len(LENGTHS)
        grades = len(drafter.odds)
        self._right, self._wrong = [0.0] * grades, [0.0] * grades
        self._last = [0] * grades  # where in the text it was tried
        self._plans: list[list[_Choice] | None] = [None] * grades
        self._planned = 0

    def plan(self, grade: int, position: int) -> list[_Choice]:
        """Lengths that pay, the best first."""
        if position - self._planned >= FORGETTING // 4:
            self._plans = [None] * len(self._plans)
            self._planned = position
        plan = self._plans[grade]
        if plan is None:
            plan = self._plans[grade] = self._new_plan(grade, position)
        return plan

    def _new_plan(self, grade: int, position: int) -> list[_Choice]:
        kept = 0.5 ** ((position - self._last[grade]) / FORGETTING)
        right, wrong = kept * self._right[grade], kept * self._wrong[grade]
        odds = (right + PRIOR_WEIGHT * self.drafter.odds[grade]) / (right + wrong + PRIOR_WEIGHT)
        pairs = zip(LENGTHS, self.costs, strict=True)
        choices = [_Choice(_expected(odds, length) / cost, length, cost - 1) for length, cost in pairs]
        return sorted((choice for choice in choices if choice.speed > 1), reverse=True)

    def take_time(self, length: int, steps: float) -> None:
        """A pass with such a draft took as long as so many plain steps; one that was interrupted by others counts
        little.
        """
        width = _width(length)
        bounded = min(max(steps, 0.5 * self.costs[width]), 2 * self.costs[width])
        self.costs[width] += (0.2 if self._measured[width] else 0.6) * (bounded - self.costs[width])
        self._measured[width] = True

    def take_outcome(self, grade: int, length: int, accepted: int, position: int) -> None:
        """Of a draft of that grade so many tokens were right."""
        self._right[grade] = MEMORY * self._right[grade] + accepted
        self._wrong[grade] = MEMORY * self._wrong[grade] + (accepted < length)
        self._last[grade] = position
        self._plans = [None] * len(self._plans)


def _expected(odds: float, length: int) -> float:
    """Tokens that a pass with such a draft gives, the one that is drawn anyway included."""
    return (1 - odds ** (length + 1)) / (1 - odds)


def _width(length: int) -> int:
    """The place in LENGTHS of the smallest one that a draft fits into."""
    return next((place for place, most in enumerate(LENGTHS) if length <= most), len(LENGTHS) - 1)
