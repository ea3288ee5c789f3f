"""The compiled quantizers: the same bytes from every kernel and number of threads, and a check of each inner step."""

from __future__ import annotations

import numpy as np
import pytest
from forced_kernel import can_run, kernel
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from quantlab import native
from quantlab.native import quantizers

LEVELS = {"q4_0": 16, "q4_1": 16, "q5_0": 32, "q5_1": 32, "q8_0": 255}
FEWER = {"q4_0": 7, "q4_1": 8, "q5_0": 31, "q5_1": 4, "q8_0": 15}

every_format = pytest.mark.parametrize("format", LEVELS)


KERNELS = [name for name in ("scalar", "avx2") if can_run(name)]
two_kernels = pytest.mark.skipif(len(KERNELS) < 2, reason="this processor has the portable kernel only")


def correlated_moment(columns: int, seed: int = 0, tokens: int = 2000) -> np.ndarray:
    """Inputs of very different sizes that depend on each other."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(columns, columns)) / np.sqrt(columns) + 0.5 * np.eye(columns)
    inputs = rng.normal(size=(tokens, columns)) @ mixing * np.exp(rng.normal(size=columns))
    moment = (inputs.T @ inputs / tokens).astype(np.float32)
    return np.ascontiguousarray((moment + moment.T) / 2)


def heavy_tailed(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_t(4, (rows, columns)) * 0.02).astype(np.float32)


def importance_of(moment: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(moment.diagonal())


def storage_order(columns: int) -> np.ndarray:
    return np.arange(columns, dtype=np.int32)


def damping_of(moment: np.ndarray) -> float:
    return 0.01 * float(moment.diagonal().mean())


def tiles_of(moment: np.ndarray, damping: float = 0.0) -> np.ndarray:
    starts = range(0, len(moment), 32)
    return np.stack([moment[i : i + 32, i : i + 32] for i in starts]) + np.float32(damping) * np.eye(
        32, dtype=np.float32
    )


def every_stage(format: str, levels: int, weights: np.ndarray, moment: np.ndarray, threads: int) -> list[np.ndarray]:
    """What each quantizer makes of a weight, one building on the other."""
    importance, damping = importance_of(moment), damping_of(moment)
    results = [
        quantizers.search(format, weights, levels, importance, threads=threads),
        quantizers.search(format, weights, levels, importance, by_magnitude=True, threads=threads),
    ]
    factor = quantizers.FeedbackFactor(moment, damping, storage_order(len(moment)), threads=threads)
    results.append(quantizers.feed_back(format, weights, levels, factor, threads=threads))
    mixed = np.random.default_rng(0).permutation(len(moment)).astype(np.int32)
    columnwise = quantizers.FeedbackFactor(moment, damping, mixed, threads=threads)
    given_scales = results[0].copy()
    results.append(quantizers.feed_back(format, weights, levels, columnwise, blocks=given_scales, threads=threads))
    damped = quantizers.SecondMoment(moment, damping, threads=threads)
    blocks = results[2].copy()
    quantizers.refit(format, weights, levels, damped, blocks, threads=threads)
    results.append(blocks.copy())
    quantizers.descend(format, weights, levels, damped, blocks, sweeps=2, threads=threads)
    results.append(blocks)
    refined = results[0].copy()
    quantizers.refine(format, weights, levels, tiles_of(moment, damping), refined, threads=threads)
    results.append(refined)
    results.append(quantizers.weighted_squares(format, weights, damped, blocks, threads=threads))
    results.append(quantizers.weighted_squares(format, weights, damped, threads=threads))
    return results


def assert_same(ours: list[np.ndarray], theirs: list[np.ndarray]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(mine, other)


@two_kernels
@every_format
@pytest.mark.parametrize("levels", [LEVELS, FEWER], ids=["all", "fewer"])
def test_kernels_give_the_same_bits(format, levels):
    weights, moment = heavy_tailed(37, 160), correlated_moment(160)
    results = []
    for name in KERNELS:
        with kernel(name):
            results.append(every_stage(format, levels[format], weights, moment, 2))
    assert_same(*results)


@every_format
def test_bits_do_not_depend_on_the_number_of_threads(format):
    weights, moment = heavy_tailed(150, 96), correlated_moment(96)
    single = every_stage(format, LEVELS[format], weights, moment, 1)
    for threads in (2, 3, 7):
        assert_same(every_stage(format, LEVELS[format], weights, moment, threads), single)


@every_format
def test_a_row_does_not_depend_on_the_others(format):
    weights, moment = heavy_tailed(70, 64), correlated_moment(64)
    whole = every_stage(format, LEVELS[format], weights, moment, 1)
    for row in (0, 15, 16, 69):
        alone = every_stage(format, LEVELS[format], weights[row : row + 1], moment, 1)
        assert_same(alone, [result[row : row + 1] for result in whole])


def finite_weights(rows: int = 3, columns: int = 64):
    """Gaussians, ties, constants, numbers of any size that half precision's scales can hold."""
    near = st.integers(-16, 16).map(lambda i: i / 8)
    wide = st.floats(-30000, 30000, width=32)
    tiny = st.floats(-(2.0**-20), 2.0**-20, width=32)
    return st.one_of(*(arrays(np.float32, (rows, columns), elements=kind) for kind in (near, wide, tiny)))


@two_kernels
@every_format
@given(data=st.data())
@settings(deadline=None, max_examples=25, derandomize=True)
def test_kernels_search_any_numbers_alike(format, data):
    weights = data.draw(finite_weights())
    importance = data.draw(arrays(np.float32, 64, elements=st.floats(0, 1, width=32)))
    levels = data.draw(st.sampled_from([LEVELS[format], FEWER[format]]))
    results = []
    for name in KERNELS:
        with kernel(name):
            results.append(quantizers.search(format, weights, levels, importance))
    np.testing.assert_array_equal(*results)


@every_format
@given(data=st.data())
@settings(deadline=None, max_examples=60, derandomize=True)
def test_search_is_never_worse_than_rounding_to_nearest(format, data):
    weights = data.draw(finite_weights())
    importance = data.draw(arrays(np.float32, 64, elements=st.floats(0, 1, width=32)))
    levels = data.draw(st.sampled_from([LEVELS[format], FEWER[format]]))
    counted = importance.astype(np.float64).reshape(2, 32)
    counted[~counted.any(axis=1)] = 1

    def errors(blocks: np.ndarray) -> np.ndarray:
        difference = weights.astype(np.float64) - native.dequantize(format, blocks)
        return (counted * difference.reshape(-1, 2, 32) ** 2).sum(axis=2)

    found = errors(quantizers.search(format, weights, levels, importance))
    nearest = errors(native.quantize(format, weights, levels))
    assert (found <= nearest * (1 + 1e-14)).all()


@every_format
@pytest.mark.parametrize("start", ["searched", "nearest"])
def test_refined_blocks_have_a_lower_error_by_their_tiles(format, start):
    weights, moment = heavy_tailed(40, 96), correlated_moment(96)
    tiles = tiles_of(moment)

    def errors(blocks: np.ndarray) -> np.ndarray:
        rows = (weights.astype(np.float64) - native.dequantize(format, blocks)).reshape(40, 3, 32)
        return np.einsum("rbi,bij,rbj->rb", rows, tiles.astype(np.float64), rows)

    nearest = native.quantize(format, weights, LEVELS[format])
    blocks = nearest.copy()
    if start == "searched":
        blocks = quantizers.search(format, weights, LEVELS[format], importance_of(moment))
    before = errors(blocks)
    quantizers.refine(format, weights, LEVELS[format], tiles, blocks)
    assert (errors(blocks) <= np.minimum(before, errors(nearest)) * (1 + 1e-4)).all()
    assert errors(blocks).sum() < 0.8 * before.sum()


def test_blocks_whose_tile_is_not_positive_definite_stay():
    weights, moment = heavy_tailed(5, 64), correlated_moment(64)
    tiles = tiles_of(moment)
    tiles[1, 3, 3] = -1
    blocks = quantizers.search("q4_1", weights, 16, importance_of(moment))
    refined = blocks.copy()
    quantizers.refine("q4_1", weights, 16, tiles, refined)
    np.testing.assert_array_equal(refined[:, 20:], blocks[:, 20:])
    assert (refined[:, :20] != blocks[:, :20]).any()


@every_format
def test_codes_stay_within_the_levels(format):
    weights, moment = heavy_tailed(33, 64), correlated_moment(64)
    for levels in (3, FEWER[format]):
        for blocks in every_stage(format, levels, weights, moment, 1)[:7]:
            bodies = blocks.reshape(33, 2, -1)
            unit = bodies.copy()
            unit[..., :2] = np.frombuffer(np.float16(1).tobytes(), np.uint8)
            if format in ("q4_1", "q5_1"):
                unit[..., 2:4] = 0
            codes = native.dequantize(format, np.ascontiguousarray(unit.reshape(33, -1)))
            limits = {"q4_1": (0, levels - 1), "q5_1": (0, levels - 1), "q8_0": (-(levels - 1) // 2, (levels - 1) // 2)}
            least, most = limits.get(format, (-(levels // 2), levels - 1 - levels // 2))
            assert codes.min() >= least
            assert codes.max() <= most


def test_squares_are_those_of_double_precision():
    weights, moment = heavy_tailed(21, 96), correlated_moment(96)
    blocks = native.quantize("q4_1", weights, 16)
    errors = weights.astype(np.float64) - native.dequantize("q4_1", blocks)
    damped = moment.astype(np.float64) + 0.25 * np.eye(96)
    ours = quantizers.SecondMoment(moment, 0.25)
    for rows, given_blocks in ((errors, blocks), (weights.astype(np.float64), None)):
        found = quantizers.weighted_squares("q4_1", weights, ours, given_blocks)
        np.testing.assert_allclose(found[:, 0], np.einsum("ri,ij,rj->r", rows, damped, rows), rtol=1e-5)
        np.testing.assert_allclose(found[:, 1], (rows**2).sum(axis=1), rtol=1e-6)


def test_a_moment_that_is_not_positive_definite_is_refused():
    moment = correlated_moment(64)
    moment[3, 3] = -1
    with pytest.raises(ArithmeticError, match="not positive definite"):
        quantizers.FeedbackFactor(moment, 0.01, storage_order(64))
    moment[3, 3] = np.nan
    with pytest.raises(ArithmeticError, match="not positive definite"):
        quantizers.FeedbackFactor(moment, 0.01, storage_order(64))


def test_shapes_that_do_not_belong_together_are_refused():
    weights, moment = heavy_tailed(4, 64), correlated_moment(64)
    blocks = native.quantize("q4_1", weights, 16)
    with pytest.raises(ValueError, match="importance has 32 columns; expected 64"):
        quantizers.search("q4_1", weights, 16, np.ones(32, np.float32))
    with pytest.raises(ValueError, match="q4_1 cannot use 17 levels"):
        quantizers.search("q4_1", weights, 17, np.ones(64, np.float32))
    with pytest.raises(ValueError, match="unknown block format 'q3_1'"):
        quantizers.search("q3_1", weights, 16, np.ones(64, np.float32))
    with pytest.raises(ValueError, match="order is not a permutation of the columns"):
        quantizers.FeedbackFactor(moment, 0.01, np.zeros(64, np.int32))
    with pytest.raises(ValueError, match="a second moment must be square, of whole blocks"):
        quantizers.SecondMoment(np.ascontiguousarray(moment[:40, :40]))
    other = quantizers.SecondMoment(correlated_moment(96))
    with pytest.raises(ValueError, match="the second moment has 96 columns; expected 64"):
        quantizers.refit("q4_1", weights, 16, other, blocks)
    with pytest.raises(ValueError, match="the second moment has 96 columns; expected 64"):
        quantizers.weighted_squares("q4_1", weights, other)
    backwards = quantizers.FeedbackFactor(moment, 0.01, storage_order(64)[::-1].copy())
    quantizers.feed_back("q4_1", weights, 16, backwards)
    interleaved = quantizers.FeedbackFactor(
        moment, 0.01, np.ascontiguousarray(storage_order(64).reshape(2, 32).T.reshape(-1))
    )
    with pytest.raises(ValueError, match="the factor's order mixes blocks; scales must be given then"):
        quantizers.feed_back("q4_1", weights, 16, interleaved)
    with pytest.raises(TypeError):
        quantizers.refit("q4_1", weights.astype(np.float64), 16, other, blocks)
