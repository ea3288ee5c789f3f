"""Weighted search beside exhaustive search, and for what it promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from slow_quantizers import gaussian, least_affine_error, limits_of, opened

from quantlab import native
from quantlab.formats import FORMATS
from quantlab.native import quantizers
from quantlab.quantization.search import importance_of, search_blocks
from quantlab.quantization.statistics import InputStatistics

OWN_SCALES = [name for name, row in FORMATS.items() if row.scale_of == "block"]


def statistics(importance: np.ndarray) -> InputStatistics:
    return InputStatistics(100, torch.from_numpy(importance))


def errors_of(format: str, weights: np.ndarray, blocks: np.ndarray, importance: np.ndarray) -> np.ndarray:
    """Weighted squared error of each row."""
    return (importance * (weights.astype(np.float64) - native.dequantize(format, blocks)) ** 2).sum(axis=1)


def uneven(columns: int, seed: int = 1) -> np.ndarray:
    return np.exp(np.random.default_rng(seed).normal(size=columns)).astype(np.float32)


@pytest.mark.parametrize(("levels", "rows"), [(2, 12), (3, 4)])
def test_affine_blocks_are_close_to_the_best_there_are(levels, rows):
    weights, importance = gaussian(rows, 32), uneven(32)
    errors = errors_of("q4_1", weights, quantizers.search("q4_1", weights, levels, importance), importance)
    best = np.array([least_affine_error(row, importance, levels) for row in weights])
    assert (errors >= best * (1 - 1e-6)).all()
    assert errors.sum() <= best.sum() * 1.01


@pytest.mark.parametrize("format", OWN_SCALES)
def test_symmetric_and_affine_blocks_are_close_to_a_scan_of_all_scales(format):
    """Steps a thousandth apart, each with the nearest codes; for affine formats offsets a tenth of a step apart."""
    row, importance = gaussian(1, 32, seed=5)[0], uneven(32)
    levels = {"q8_0": 255}.get(format, 8)
    low, high, has_offset = limits_of(format, levels)
    largest = np.abs(row).max()
    best = np.inf
    for step in np.linspace(0.5, 1.5, 300) * 2 * largest / (high - low):
        for sign in (1, -1):
            offsets = row.min() + step * np.linspace(-1, 3, 41) if has_offset else [0.0]
            for offset in offsets:
                codes = np.clip(np.round((row - offset) / (sign * step)), low, high)
                best = min(best, (importance * (row - offset - sign * step * codes) ** 2).sum())
    blocks = quantizers.search(format, row[None], levels, importance)
    slack = 1.1 if format == "q8_0" else 1.01
    assert errors_of(format, row[None], blocks, importance)[0] <= best * slack


@pytest.mark.parametrize("format", OWN_SCALES)
def test_codes_are_the_nearest_for_the_stored_scales(format):
    weights = gaussian(20, 64)
    blocks = search_blocks(weights, FORMATS[format], None)
    d, m, codes = opened(format, blocks)
    low, high, _ = limits_of(format, FORMATS[format].levels)
    step, offset = np.repeat(d, 32, axis=1), np.repeat(m, 32, axis=1)
    for other in (codes - 1, codes + 1):
        allowed = (other >= low) & (other <= high)
        closer = np.abs(weights - step * other - offset) < np.abs(weights - step * codes - offset) - 1e-7
        assert not (allowed & closer).any()


def test_minima_may_be_positive():
    weights = gaussian(4, 32) + np.float32(1)
    _, m, _ = opened("q4_1", search_blocks(weights, FORMATS["q4_1"], None))
    assert (m > 0.9).all()


def test_the_inputs_size_decides_between_columns():
    """Half the columns hardly count: the others are as close as if the block held them alone."""
    weights = gaussian(50, 32)
    importance = np.where(np.arange(32) % 2 == 0, 1, 1e-8).astype(np.float32)
    weighted = search_blocks(weights, FORMATS["q4_1"], statistics(importance))
    plain = search_blocks(weights, FORMATS["q4_1"], None)
    errors = [errors_of("q4_1", weights, blocks, importance).sum() for blocks in (weighted, plain)]
    assert errors[0] < 0.7 * errors[1]


def test_statistics_in_other_units_give_the_same_bytes():
    weights, importance = gaussian(9, 96), uneven(96)
    expected = search_blocks(weights, FORMATS["q4_1"], statistics(importance))
    for factor in (2.0**-60, 2.0**60):
        scaled = search_blocks(weights, FORMATS["q4_1"], statistics(importance * np.float32(factor)))
        np.testing.assert_array_equal(scaled, expected)


def test_columns_without_inputs_count_alike_where_a_block_has_no_others():
    weights, importance = gaussian(9, 96), uneven(96)
    importance[32:64] = 0
    mixed = search_blocks(weights, FORMATS["q4_1"], statistics(importance)).reshape(9, 3, 20)
    plain = search_blocks(weights, FORMATS["q4_1"], None).reshape(9, 3, 20)
    np.testing.assert_array_equal(mixed[:, 1], plain[:, 1])
    assert (mixed[:, 0] != plain[:, 0]).any()


@pytest.mark.parametrize("format", OWN_SCALES)
@pytest.mark.parametrize("value", [0.0, 1.0, -0.3, 3e-7])
def test_constant_blocks_are_as_close_as_half_precision(format, value):
    weights = np.full((2, 32), value, np.float32)
    decoded = native.dequantize(format, search_blocks(weights, FORMATS[format], None))
    nearest = native.dequantize(format, native.quantize(format, weights, FORMATS[format].levels))
    assert (np.abs(decoded - weights) <= np.abs(nearest - weights)).all()


def test_importance_is_relative_to_the_largest():
    np.testing.assert_array_equal(importance_of(statistics(np.float32([2, 8, 0])), 3), np.float32([0.25, 1, 0]))
    np.testing.assert_array_equal(importance_of(statistics(np.zeros(3, np.float32)), 3), np.ones(3, np.float32))
    np.testing.assert_array_equal(importance_of(None, 3), np.ones(3, np.float32))
