"""Joint least squares and coordinate descent beside double precision, and that they only ever improve."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from slow_quantizers import best_scales_error, correlated_moment, gaussian, limits_of, opened, weighted_error

from quantlab import native
from quantlab.formats import FORMATS
from quantlab.native import quantizers
from quantlab.quantization.refit import refit_blocks

FEWER = {"q4_0": 7, "q4_1": 4, "q5_0": 31, "q5_1": 8, "q8_0": 15}

OWN_SCALES = [name for name, row in FORMATS.items() if row.scale_of == "block"]
every_format = pytest.mark.parametrize("format", OWN_SCALES)
few_or_all = pytest.mark.parametrize("few", [False, True], ids=["all", "fewer"])


def error_of(format: str, weights: np.ndarray, blocks: np.ndarray, moment: np.ndarray) -> np.ndarray:
    return weighted_error(weights, native.dequantize(format, blocks), moment)


@every_format
@few_or_all
def test_refit_finds_the_joint_least_squares_scales(format, few):
    """All that is left above the optimum for real numbers is rounding to half precision and the ridge."""
    levels = FEWER[format] if few else FORMATS[format].levels
    weights, moment = gaussian(20, 160), correlated_moment(160)
    blocks = native.quantize(format, weights, levels)
    before = error_of(format, weights, blocks, moment)
    codes = opened(format, blocks)[2]
    quantizers.refit(format, weights, levels, quantizers.SecondMoment(moment), blocks)
    found = error_of(format, weights, blocks, moment)
    best = best_scales_error(weights, codes, moment, has_offset=limits_of(format, levels)[2])
    np.testing.assert_array_equal(opened(format, blocks)[2], codes)
    assert (found >= best * (1 - 1e-4)).all()
    assert (found < before).all()
    assert found.sum() <= best.sum() * 1.02 + 1e-3 * before.sum()


@every_format
def test_refit_leaves_rows_that_cannot_fall(format):
    """At the optimum, rounded, another refit changes nothing but by a lower error."""
    weights, moment = gaussian(30, 96), correlated_moment(96)
    damped = quantizers.SecondMoment(moment)
    blocks = native.quantize(format, weights, FORMATS[format].levels)
    errors = []
    for _ in range(4):
        quantizers.refit(format, weights, FORMATS[format].levels, damped, blocks)
        errors.append(error_of(format, weights, blocks, moment))
    for earlier, later in itertools.pairwise(errors):
        assert (later <= earlier * (1 + 1e-5)).all()


@every_format
@few_or_all
def test_descent_ends_where_no_single_code_can_improve(format, few):
    levels = FEWER[format] if few else FORMATS[format].levels
    weights, moment = gaussian(10, 96), correlated_moment(96)
    blocks = native.quantize(format, weights, levels)
    before = error_of(format, weights, blocks, moment)
    damped = quantizers.SecondMoment(moment)
    quantizers.descend(format, weights, levels, damped, blocks, sweeps=60, trials=None, passes=3, scales=False)
    after = error_of(format, weights, blocks, moment)
    assert (after < before).all()
    d, m, codes = opened(format, blocks)
    low, high, _ = limits_of(format, levels)
    errors = weights.astype(np.float64) - np.repeat(d, 32, axis=1) * codes - np.repeat(m, 32, axis=1)
    gradient = errors @ moment.astype(np.float64)
    for move in (-2, -1, 1, 2):
        change = move * np.repeat(d, 32, axis=1)
        falls = 2 * gradient * change - moment.diagonal() * change**2
        allowed = (codes + move >= low) & (codes + move <= high)
        assert (np.where(allowed, falls, 0) <= 1e-4 * after[:, None]).all()


@every_format
@few_or_all
def test_no_step_raises_the_error(format, few):
    levels = FEWER[format] if few else FORMATS[format].levels
    weights, moment = gaussian(40, 128), correlated_moment(128)
    damped = quantizers.SecondMoment(moment, 0.05)
    objective = moment + 0.05 * np.eye(128)
    blocks = native.quantize(format, weights, levels)
    last = error_of(format, weights, blocks, objective)
    for _ in range(3):
        for step in ("refit", "codes", "all"):
            if step == "refit":
                quantizers.refit(format, weights, levels, damped, blocks)
            else:
                trials, scales = (1, True) if step == "all" else (None, False)
                quantizers.descend(format, weights, levels, damped, blocks, trials=trials, scales=scales)
            error = error_of(format, weights, blocks, objective)
            assert (error <= last * (1 + 1e-5)).all()
            last = error


def test_descent_moves_scales_to_the_least_squares_of_their_block():
    """One block, codes that cannot move: d and m are those of least squares, rounded."""
    weights, moment = gaussian(8, 32), correlated_moment(32)
    blocks = native.quantize("q4_1", weights, 16)
    codes = opened("q4_1", blocks)[2]
    damped = quantizers.SecondMoment(moment)
    for _ in range(3):
        quantizers.refit("q4_1", weights, 16, damped, blocks)
    best = best_scales_error(weights, codes, moment, has_offset=True)
    np.testing.assert_allclose(error_of("q4_1", weights, blocks, moment), best, rtol=1e-2)


@every_format
@few_or_all
def test_quantizing_blocks_anew_goes_below_moving_single_codes(format, few):
    levels = FEWER[format] if few else FORMATS[format].levels
    weights, moment = gaussian(40, 128), correlated_moment(128)
    damped = quantizers.SecondMoment(moment)
    errors = []
    for trials in (None, 0, 2):
        blocks = quantizers.search(format, weights, levels, np.ascontiguousarray(moment.diagonal()))
        quantizers.descend(format, weights, levels, damped, blocks, sweeps=6, trials=trials)
        errors.append(error_of(format, weights, blocks, moment).sum())
    assert errors[2] < errors[1] < errors[0]


def test_rounds_and_sweeps_each_lower_the_error():
    weights, moment = gaussian(40, 128), correlated_moment(128)
    damped = quantizers.SecondMoment(moment)
    errors = []
    for rounds, sweeps in ((0, 0), (1, 0), (1, 1), (2, 1), (2, 3)):
        blocks = native.quantize("q4_1", weights, 16)
        refit_blocks(weights, FORMATS["q4_1"], damped, blocks, rounds=rounds, sweeps=sweeps)
        errors.append(error_of("q4_1", weights, blocks, moment).sum())
    assert errors == sorted(errors, reverse=True)
    assert len(set(errors)) == len(errors)


def test_blocks_without_a_step_stay_finite():
    """All codes alike: offset and step cannot be told apart."""
    weights, moment = gaussian(5, 64), correlated_moment(64)
    weights[:, :32] = 0.25
    weights[2] = 0
    blocks = native.quantize("q4_1", weights, 16)
    before = error_of("q4_1", weights, blocks, moment)
    refit_blocks(weights, FORMATS["q4_1"], quantizers.SecondMoment(moment), blocks, rounds=2, sweeps=1)
    after = error_of("q4_1", weights, blocks, moment)
    assert np.isfinite(after).all()
    assert (after <= before * (1 + 1e-6)).all()
