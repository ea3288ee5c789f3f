"""Error feedback beside GPTQ as its paper has it, in double precision."""

from __future__ import annotations

import numpy as np
import pytest
from slow_quantizers import correlated_moment, gaussian, gptq_codes, limits_of, opened, weighted_error

from quantlab import native
from quantlab.formats import FORMATS
from quantlab.native import quantizers
from quantlab.quantization.gptq import damped_factor, feedback_blocks, processing_order

OWN_SCALES = [name for name, row in FORMATS.items() if row.scale_of == "block"]

FEWER = {"q4_0": 7, "q4_1": 4, "q5_0": 31, "q5_1": 8, "q8_0": 15}


def damping_of(moment: np.ndarray) -> float:
    return 0.01 * float(moment.diagonal().mean())


@pytest.mark.parametrize("format", OWN_SCALES)
@pytest.mark.parametrize("few", [False, True], ids=["all", "fewer"])
@pytest.mark.parametrize("order", ["storage", "mixed"])
def test_codes_are_those_of_the_paper_for_given_scales(format, few, order):
    """The scales are the searched ones; columns in storage order or in any other."""
    levels = FEWER[format] if few else FORMATS[format].levels
    weights, moment = gaussian(40, 96), correlated_moment(96)
    columns = np.arange(96) if order == "storage" else np.random.default_rng(3).permutation(96)
    blocks = quantizers.search(format, weights, levels, np.ones(96, np.float32))
    d, m, _ = opened(format, blocks)
    factor = quantizers.FeedbackFactor(moment, damping_of(moment), columns.astype(np.int32))
    quantizers.feed_back(format, weights, levels, factor, blocks=blocks)
    low, high, _ = limits_of(format, levels)
    expected = gptq_codes(weights, moment, damping_of(moment), columns, (d, m), (low, high))
    np.testing.assert_array_equal(opened(format, blocks)[2], expected)


@pytest.mark.parametrize("format", OWN_SCALES)
def test_codes_are_those_of_the_paper_for_scales_found_on_the_way(format):
    """Whatever the scales turn out to be, the codes follow from them."""
    weights, moment = gaussian(33, 128), correlated_moment(128)
    importance = np.ascontiguousarray(moment.diagonal())
    order = processing_order(importance)
    factor, share = damped_factor(moment, order)
    assert share == 0.01
    blocks = feedback_blocks(weights, FORMATS[format], factor)
    d, m, codes = opened(format, blocks)
    low, high, _ = limits_of(format, FORMATS[format].levels)
    expected = gptq_codes(weights, moment, damping_of(moment), order, (d, m), (low, high))
    np.testing.assert_array_equal(codes, expected)


@pytest.mark.parametrize("format", OWN_SCALES)
@pytest.mark.parametrize("few", [False, True], ids=["all", "fewer"])
def test_feedback_leaves_far_less_error_than_search(format, few):
    levels = FEWER[format] if few else FORMATS[format].levels
    weights, moment = gaussian(64, 128), correlated_moment(128)
    importance = np.ascontiguousarray(moment.diagonal())
    factor, _ = damped_factor(moment, processing_order(importance))
    fed_back = quantizers.feed_back(format, weights, levels, factor, importance=importance)
    searched = quantizers.search(format, weights, levels, importance)
    errors = [weighted_error(weights, native.dequantize(format, b), moment).sum() for b in (fed_back, searched)]
    assert errors[0] < 0.7 * errors[1]


def test_trials_lower_the_error():
    weights, moment = gaussian(64, 128), correlated_moment(128)
    factor, _ = damped_factor(moment, np.arange(128, dtype=np.int32))
    errors = []
    for trials in (0, 1, 3):
        blocks = quantizers.feed_back("q4_1", weights, 16, factor, trials=trials)
        errors.append(weighted_error(weights, native.dequantize("q4_1", blocks), moment).sum())
    assert errors[2] < errors[1] < errors[0]


def test_independent_inputs_leave_nothing_to_feed_back():
    """With a diagonal moment the codes are the nearest to the weights."""
    weights = gaussian(20, 64)
    moment = np.diag(np.exp(np.random.default_rng(0).normal(size=64))).astype(np.float32)
    blocks = quantizers.search("q4_1", weights, 16, np.ascontiguousarray(moment.diagonal()))
    factor = quantizers.FeedbackFactor(moment, 0.0, np.arange(64, dtype=np.int32))
    fed_back = quantizers.feed_back("q4_1", weights, 16, factor, blocks=blocks.copy())
    np.testing.assert_array_equal(native.dequantize("q4_1", fed_back), native.dequantize("q4_1", blocks))


def test_blocks_are_processed_by_falling_energy_and_stay_whole():
    importance = np.repeat(np.float32([1, 3, 3, 5]), 32)
    importance[70] = 4
    importance[64] = 2
    order = processing_order(importance)
    assert order.dtype == np.int32
    storage = np.arange(128).reshape(4, 32)
    second = [70, *range(65, 70), *range(71, 96), 64]
    assert order.tolist() == [*storage[3], *storage[1], *second, *storage[0]]


def test_damping_grows_until_the_moment_has_a_factor():
    moment = np.diag(np.float32([1] * 63 + [-0.05]))  # no measured moment is like this, but rounding makes small ones
    order = np.arange(64, dtype=np.int32)
    _, share = damped_factor(np.ascontiguousarray(moment), order)
    assert share == pytest.approx(0.1)
    moment[63, 63] = -20
    with pytest.raises(ArithmeticError):
        damped_factor(np.ascontiguousarray(moment), order)
