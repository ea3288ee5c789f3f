"""The smallest plan that meets a divergence: bisection along a frontier of plans, by real measurements."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from quantlab.search.measuring import Divergence
from quantlab.search.plan_file import Plan

TOLERANCE = 0.002  # of the bytes: closer than that, the next plan is not worth a measurement
MOST_TRIALS = 16


@dataclass(frozen=True)
class Tried:
    """A plan and its divergence on held-out windows."""

    plan: Plan
    found: Divergence


def smallest_that_meets(plans: Sequence[Plan], max_kld: float, measure: Callable[[Plan], Divergence]) -> Tried:
    """The smallest of `plans` (ascending in bytes, descending in predicted divergence) whose upper bound is at most
    `max_kld`, or the last where even that is not.

    The next trial is where the prediction, scaled by the last trial's excess over its own, meets the target; within the
    bracket of what failed and what passed, and half-way between them where predictions do not move.
    """
    predicted = [-plan.sum_of_parts for plan in plans]  # ascending
    low, high, best = -1, len(plans), None  # the largest that failed, the smallest that passed
    scale, last = 1.0, None
    for trial in range(MOST_TRIALS):
        wanted = min(bisect_left(predicted, -max_kld / scale), len(plans) - 1)
        index = min(max(wanted, low + 1), high - 1)
        if trial and trial % 2 == 0 and high <= len(plans) - 1:
            index = (low + high) // 2
        last = Tried(plans[index], measure(plans[index]))
        bound = last.found.upper_bound()
        if bound <= max_kld:
            high, best = index, last
        else:
            low = index
        if plans[index].sum_of_parts > 0 and bound > 0:
            scale = bound / plans[index].sum_of_parts
        if high - low <= 1 or (best and low >= 0 and _alike(plans[low], plans[high])):
            break
    if best is None:
        assert last is not None
        return last if last.plan is plans[-1] else Tried(plans[-1], measure(plans[-1]))
    return best


def _alike(small: Plan, large: Plan) -> bool:
    return large.bytes - small.bytes <= TOLERANCE * large.bytes
