"""When a run whose learning rates fall to zero is to be given up."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise


def is_given_up(history: Sequence[tuple[int, float]], best_step: int, patience: int) -> bool:
    """Whether the latest `patience` losses were each no lower than the one before, nor the best.

    From a good start losses rise while rates are high, and fall below the start's as the rates fall: as long as they
    come down, the best may be to come.

    Args:
        history: (step, loss), ascending; a loss that is NaN is lower than none.
        best_step: that of the best loss.
    """
    latest = history[-patience - 1 :]
    if len(latest) <= patience or latest[0][0] < best_step:
        return False
    return not any(now < before for (_, before), (_, now) in pairwise(latest))
