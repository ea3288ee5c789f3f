"""The knapsack against trying everything."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlab.search.knapsack import Choice, Knapsack

choices = st.lists(st.builds(Choice, st.integers(0, 40), st.integers(0, 1000).map(float)), min_size=1, max_size=4)
problems = st.lists(choices, min_size=1, max_size=5)


def best_by_trial(items, budget):
    """The least cost of all combinations that fit, and the fewest bytes at which it can be had."""
    fitting = [c for c in itertools.product(*items) if sum(x.bytes for x in c) <= budget]
    return min((math.fsum(x.cost for x in c), sum(x.bytes for x in c)) for c in fitting)


@given(problems, st.integers(0, 200))
@settings(max_examples=200, deadline=None)
def test_finds_the_least_cost_within_the_budget(items, extra):
    knapsack = Knapsack(items)
    budget = knapsack.least + extra
    chosen = knapsack.solve(budget)
    assert knapsack.bytes_of(chosen) <= budget
    assert knapsack.cost_of(chosen) == best_by_trial(items, budget)[0]


@given(problems)
@settings(max_examples=100, deadline=None)
def test_the_frontier_holds_every_size_where_the_best_cost_falls(items):
    knapsack = Knapsack(items)
    expected, before = [], math.inf
    for budget in range(knapsack.least, knapsack.most + 1):
        cost, size = best_by_trial(items, budget)
        if cost < before:
            expected.append((size, cost))
            before = cost
    found = [(knapsack.bytes_of(chosen), knapsack.cost_of(chosen)) for chosen in knapsack.frontier()]
    assert found == expected


@given(problems, st.integers(0, 200))
@settings(max_examples=100, deadline=None)
def test_few_states_keep_the_budget_and_lose_at_most_a_step_an_item(items, extra):
    knapsack = Knapsack(items, states=8)
    budget = knapsack.least + extra
    chosen = knapsack.solve(budget)
    assert knapsack.bytes_of(chosen) <= budget
    smaller = budget - knapsack.step * len(items)
    if smaller >= knapsack.least:
        assert knapsack.cost_of(chosen) <= best_by_trial(items, smaller)[0]


def test_round_shapes_are_solved_exactly():
    sizes = [589824, 663552, 737280, 786432, 1114112]
    knapsack = Knapsack([[Choice(size, 1 / size) for size in sizes]] * 60)
    assert knapsack.step == math.gcd(*(size - sizes[0] for size in sizes))


def test_a_thinned_frontier_keeps_both_ends():
    items = [[Choice(size, 100.0 - size) for size in range(100)]]
    every, some = list(Knapsack(items).frontier()), list(Knapsack(items).frontier(points=7))
    assert len(every) == 100
    assert len(some) == 7
    assert (some[0], some[-1]) == (every[0], every[-1])


def test_a_budget_below_the_least_is_refused():
    with pytest.raises(ValueError, match="9 bytes: the smallest choices take 10"):
        Knapsack([[Choice(10, 1.0), Choice(20, 0.5)]]).solve(9)
