"""Gradients, filters and precedence of parameters."""

from fractions import Fraction

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantlab.merging.values import Alternative, Setting, interpolated, position_of, value_at

numbers = st.floats(-1e6, 1e6, allow_nan=False)
EXAMPLES = settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.parametrize(
    ("gradient", "values"),
    [
        ((1.0,), [1.0, 1.0, 1.0, 1.0, 1.0]),
        ((0.0, 1.0), [0.0, 0.25, 0.5, 0.75, 1.0]),
        ((0.0, 0.5, 0.0), [0.0, 0.25, 0.5, 0.25, 0.0]),
        ((1.0, 2.0, 4.0, 8.0, 16.0), [1.0, 2.0, 4.0, 8.0, 16.0]),
        ((0.0, 0.0, 0.0, 1.0), [0.0, 0.0, 0.0, 0.25, 1.0]),
    ],
)
def test_gradients_over_five_layers(gradient, values):
    assert [interpolated(gradient, position_of(layer, 5)) for layer in range(5)] == values


@EXAMPLES
@given(st.lists(numbers, min_size=1, max_size=40))
def test_one_number_a_layer_comes_out_as_written(gradient):
    count = len(gradient)
    assert [interpolated(tuple(gradient), position_of(i, count)) for i in range(count)] == gradient


@EXAMPLES
@given(st.lists(numbers, min_size=1, max_size=9), st.integers(1, 50))
def test_gradients_begin_and_end_with_their_ends_and_stay_between(gradient, layers):
    values = [interpolated(tuple(gradient), position_of(layer, layers)) for layer in range(layers)]
    assert values[0] == gradient[0]
    assert layers == 1 or values[-1] == gradient[-1]
    slack = 1e-9 * max(map(abs, gradient))  # of one rounding
    assert all(min(gradient) - slack <= value <= max(gradient) + slack for value in values)


@EXAMPLES
@given(numbers, st.integers(2, 9), st.integers(1, 50))
def test_a_level_gradient_is_a_constant(value, length, layers):
    assert {interpolated((value,) * length, position_of(layer, layers)) for layer in range(layers)} == {value}


def test_positions_are_exact():
    assert position_of(1, 4) == Fraction(1, 3)
    assert position_of(0, 1) == 0


def test_the_first_filter_that_matches_counts():
    setting = Setting((Alternative(0.1, "self_attn"), Alternative(0.2, "q_proj"), Alternative(0.3)))
    assert setting.at("model.layers.0.self_attn.q_proj.weight", Fraction(0)) == 0.1
    assert setting.at("model.layers.0.mlp.q_proj.weight", Fraction(0)) == 0.2
    assert setting.at("model.norm.weight", Fraction(0)) == 0.3
    assert setting.filters == ("self_attn", "q_proj")


def test_a_filter_of_a_star_passes_all_names():
    assert Setting((Alternative(0.5, "*"),)).at("model.norm.weight", Fraction(0)) == 0.5


def test_without_a_match_the_next_level_counts():
    narrow = Setting((Alternative((0.0, 1.0), "mlp"),))
    wide = Setting((Alternative(0.7),))
    assert value_at([narrow, wide], "a.mlp.b", Fraction(1, 2)) == 0.5
    assert value_at([narrow, wide], "a.norm.b", Fraction(1, 2)) == 0.7
    assert value_at([narrow, None], "a.norm.b", Fraction(1, 2)) is None


levels = st.lists(st.one_of(st.none(), numbers), max_size=4)


@EXAMPLES
@given(levels)
def test_the_first_level_with_a_value_counts(values):
    settings = [None if value is None else Setting((Alternative(value),)) for value in values]
    expected = next((value for value in values if value is not None), None)
    assert value_at(settings, "any", Fraction(0)) == expected


def test_false_and_zero_are_values():
    assert value_at([Setting((Alternative(False),)), Setting((Alternative(True),))], "any", Fraction(0)) is False
    assert value_at([Setting((Alternative(0.0),)), Setting((Alternative(1.0),))], "any", Fraction(0)) == 0.0
