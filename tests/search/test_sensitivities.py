"""Estimates from few measurements."""

from __future__ import annotations

import pytest

from quantlab.search.sensitivities import Figure, Sensitivities

FORMATS = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")
SHARES = (0.8, 0.64, 0.2, 0.16, 0.0025)
KINDS = {"a1": "a", "a2": "a", "b1": "b"}


@pytest.fixture
def table() -> Sensitivities:
    weights = {"a1": 1.0, "a2": 3.0, "b1": 2.0}
    prior = {(n, f): weight * share for n, weight in weights.items() for f, share in zip(FORMATS, SHARES, strict=True)}
    return Sensitivities(prior, KINDS)


def test_a_measurement_stands_for_itself(table):
    table.add("a1", "q4_1", 0.01, 0.001)
    assert table.figure("a1", "q4_1") == Figure(0.01, 0.001)
    assert table.measured == 1


def test_other_formats_follow_the_nearest_measured_one(table):
    table.add("a1", "q4_1", 0.0128, 0.001)
    assert table.figure("a1", "q5_0") == Figure(pytest.approx(0.004), None)
    table.add("a1", "q8_0", 0.5, 0.1)  # far off its prior; q5_0 is nearer to q4_1
    assert table.figure("a1", "q5_0") == Figure(pytest.approx(0.004), None)


def test_other_tensors_follow_the_median_of_their_kind(table):
    assert table.figure("a2", "q4_1").kld == pytest.approx(3 * 0.64)  # nothing is known: the prior
    table.add("b1", "q4_1", 2 * 0.64 * 0.5, 0.0)
    assert table.figure("a2", "q4_1").kld == pytest.approx(3 * 0.64 * 0.5)  # another kind is better than none
    table.add("a1", "q4_1", 0.64 * 0.01, 0.0)
    assert table.figure("a2", "q4_1").kld == pytest.approx(3 * 0.64 * 0.01)


def test_a_tensor_without_error_costs_nothing():
    table = Sensitivities(dict.fromkeys((("a1", f) for f in FORMATS), 0.0), {"a1": "a"})
    table.add("a1", "q4_1", 0.0, 0.0)
    assert table.figure("a1", "q5_0") == Figure(0.0, None)


def test_one_of_each_kind_comes_first(table):
    assert table.by_weight(("a1", "a2", "b1"), "q4_1") == ["a2", "b1", "a1"]
