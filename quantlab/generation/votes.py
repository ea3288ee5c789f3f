"""Self-consistency: the answer that most samples give (Wang et al. 2022, arXiv 2203.11171)."""

from __future__ import annotations

from collections.abc import Sequence


def majority(answers: Sequence[str]) -> tuple[str, dict[str, int]]:
    """The answer with the most votes, and all votes, most first; of equal ones that which came first in `answers`.

    A sample without an answer ("") does not vote; if none has one, the answer is "".
    """
    counts: dict[str, int] = {}
    for answer in answers:
        if answer:
            counts[answer] = counts.get(answer, 0) + 1
    votes = dict(sorted(counts.items(), key=lambda vote: -vote[1]))  # a stable sort: ties stay as they came
    return next(iter(votes), ""), votes
