"""Reciprocal rank fusion: one ranking of several, by ranks alone (Cormack, Clarke and Buettcher, SIGIR 2009).

Cosines and BM25 scores have no common scale; ranks have. A candidate's score is the sum of 1 / (60 + rank) over the
rankings that have it, ranks from 1.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TypeVar

CONSTANT = 60  # the paper's; it damps the difference between the first ranks

Candidate = TypeVar("Candidate", bound=Hashable)


def reciprocal_ranks(rankings: Sequence[Sequence[Candidate]]) -> dict[Candidate, float]:
    """The score of every candidate of `rankings`, each of which has the best first and nothing twice."""
    scores: dict[Candidate, float] = {}
    for ranking in rankings:
        for rank, candidate in enumerate(ranking, 1):
            scores[candidate] = scores.get(candidate, 0.0) + 1 / (CONSTANT + rank)
    return scores
