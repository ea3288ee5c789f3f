"""Walking along a frontier: the smallest plan that meets a bound, in few measurements."""

from __future__ import annotations

import pytest

from quantlab.formats import format_named
from quantlab.search.frontier import MOST_TRIALS, smallest_that_meets
from quantlab.search.measuring import Divergence
from quantlab.search.plan_file import Plan


def frontier(count: int) -> list[Plan]:
    """Plans of 1000, 1010 ... bytes; each is predicted to lose 3 % less than the one before."""
    formats = {"a": format_named("q4_1")}
    return [Plan(formats, 1000 + 10 * index, 4.0, 0.97**index) for index in range(count)]


class Measure:
    """A stand-in for quantizing and measuring: the truth is another function of the size."""

    def __init__(self, factor: float, power: float = 1.0) -> None:
        self.factor, self.power, self.calls = factor, power, 0

    def __call__(self, plan: Plan) -> Divergence:
        self.calls += 1
        return Divergence(self.factor * plan.sum_of_parts**self.power, 0.0, 20)


@pytest.mark.parametrize(("factor", "power"), [(1.0, 1.0), (1.4, 1.0), (0.6, 1.0), (1.2, 0.7), (0.9, 1.5)])
@pytest.mark.parametrize("target", [0.9, 0.3, 0.05])
def test_finds_the_smallest_within_the_tolerance(factor: float, power: float, target: float):
    plans, measure = frontier(200), Measure(factor, power)
    found = smallest_that_meets(plans, target, measure)
    truth = next(plan for plan in plans if Measure(factor, power)(plan).kld <= target)
    assert found.found.kld <= target
    assert found.plan.bytes <= truth.bytes * 1.003
    assert measure.calls <= MOST_TRIALS


def test_the_smallest_plan_of_all_can_be_the_answer():
    plans = frontier(50)
    assert smallest_that_meets(plans, 5.0, Measure(1.0)).plan is plans[0]


def test_the_best_comes_back_where_nothing_meets_the_target():
    plans = frontier(50)
    found = smallest_that_meets(plans, 1e-6, Measure(1.0))
    assert found.plan is plans[-1]
    assert found.found.kld > 1e-6


def test_the_bound_counts_and_not_the_mean():
    plans = frontier(100)
    found = smallest_that_meets(plans, 0.5, lambda plan: Divergence(plan.sum_of_parts, 0.1 * plan.sum_of_parts, 20))
    bound = 1 + 0.1 * 1.7291  # Student's t at 95 %, one-sided, 19 degrees of freedom (Fisher and Yates, table III)
    assert found.plan is next(plan for plan in plans if plan.sum_of_parts * bound <= 0.5)
