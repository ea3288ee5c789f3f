"""Packed matrices multiply as their formula says, to the same bits on every kernel, thread count and token count."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
from forced_kernel import can_run, kernel
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlab import native
from quantlab.native import _core

BLOCK_BYTES = {"q4_0": 18, "q4_1": 20, "q5_0": 22, "q5_1": 24, "q8_0": 34, "tq2_0": 66}
WIDE = {"tq2_0": 256}  # columns of a block; its formula is in test_ternary_products.py
ZERO_CODE = {"q4_0": 8, "q5_0": 16, "q8_0": 128}  # of the stored code; the others have a minimum
FLOATS = ("f32", "f16", "bf16")
TYPES = (*FLOATS, *BLOCK_BYTES)
TOKEN_COUNTS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 33)
EPSILON = 2.0**-24  # what one rounding to fp32 may add, relative

every_type = pytest.mark.parametrize("type", TYPES)
every_format_of_32 = pytest.mark.parametrize("type", [format for format in BLOCK_BYTES if format not in WIDE])


KERNELS = [name for name in ("scalar", "avx2", "avx512") if can_run(name)]
every_kernel = pytest.mark.parametrize("name", KERNELS)


class Codes(NamedTuple):
    """Activations in int8, with a scale for each run of 32, or one a token for weights that want it so."""

    codes: np.ndarray
    scales: np.ndarray
    sums: np.ndarray


def whole(type: str, columns: int) -> int:
    """So many columns, filled up to whole blocks."""
    unit = WIDE.get(type, 32)
    return -(-columns // unit) * unit


def random_rows(rng: np.random.Generator, type: str, rows: int, columns: int) -> np.ndarray:
    """Rows as a file holds them: any codes, scales and minima of moderate size."""
    if type in FLOATS:
        weights = rng.normal(0, 1, (rows, columns)).astype(np.float32)
        if type == "bf16":
            return (weights.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        return weights.astype({"f32": np.float32, "f16": np.float16}[type]).view(np.uint8)
    count = columns // WIDE.get(type, 32)
    blocks = rng.integers(0, 256, (rows, count, BLOCK_BYTES[type]), dtype=np.uint8)
    halves = 2 if type in ("q4_1", "q5_1") else 1
    scales = rng.normal(0, 0.02, (rows, count, halves)).astype(np.float16).view(np.uint8)
    if type == "tq2_0":
        blocks[:, :, 64:] = scales
    else:
        blocks[:, :, : 2 * halves] = scales
    return blocks.reshape(rows, -1)


def decoded(type: str, rows: np.ndarray) -> np.ndarray:
    """The weights, float32."""
    if type == "bf16":
        return (rows.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if type in FLOATS:
        return rows.view({"f32": np.float32, "f16": np.float16}[type]).astype(np.float32)
    return native.dequantize(type, rows)


def random_values(rng: np.random.Generator, tokens: int, columns: int) -> np.ndarray:
    return rng.normal(0, 1, (tokens, columns)).astype(np.float32)


def quantized(values: np.ndarray, type: str = "q4_1") -> Codes:
    tokens, columns = values.shape
    codes = np.empty((tokens, columns), np.int8)
    if type in WIDE:
        x = Codes(codes, np.empty((tokens, 1), np.float32), np.empty((tokens, columns // WIDE[type]), np.float32))
        _core.quantize_rows(values, *x)
        return x
    x = Codes(codes, *np.empty((2, tokens, columns // 32), np.float32))
    _core.quantize_tokens(values, *x)
    return x


def packed(type: str, rows: np.ndarray, columns: int, first: tuple[int, ...] = ()) -> _core.PackedMatrix:
    """The matrix, filled in pieces that start at the rows of `first`."""
    matrix = _core.PackedMatrix(type, len(rows), columns)
    starts = [0, *first, len(rows)]
    for start, end in pairwise(starts):
        matrix.fill(start, rows[start:end])
    return matrix


def product(matrix: _core.PackedMatrix, x: np.ndarray | Codes, rows: int, threads: int = 1) -> np.ndarray:
    """[tokens, rows] float32."""
    tokens = len(x.codes) if isinstance(x, Codes) else len(x)
    out = np.full((tokens, rows), np.nan, np.float32)
    pool = _core.ThreadPool(threads)
    if isinstance(x, Codes):
        matrix.multiply_codes(pool, *x, out, 0, matrix.groups)
    else:
        matrix.multiply_values(pool, x, out, 0, matrix.groups)
    return out


def stored_codes(type: str, rows: np.ndarray) -> np.ndarray:
    """The codes as unsigned integers, [rows, blocks, 32], read by decoding them with scale 1 and minimum 0."""
    plain = rows.reshape(-1, BLOCK_BYTES[type]).copy()
    plain[:, : 2 if type in ZERO_CODE else 4] = 0
    plain[:, 1] = 0x3C  # 1.0 in half precision, little-endian
    steps = native.dequantize(type, plain).astype(np.int64)
    return (steps + ZERO_CODE.get(type, 0)).reshape(len(rows), -1, 32)


def scales_and_minima(type: str, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each [rows, blocks], float64."""
    blocks = rows.reshape(len(rows), -1, BLOCK_BYTES[type])
    header = np.ascontiguousarray(blocks[:, :, :4]).view(np.float16).astype(np.float64)
    scales = header[:, :, 0]
    return scales, (-ZERO_CODE[type] * scales if type in ZERO_CODE else header[:, :, 1])


def bits(values: np.ndarray) -> np.ndarray:
    return values.view(np.uint32)


# The formula, in double precision.


@every_kernel
@every_format_of_32
@pytest.mark.parametrize("tokens", [1, 2, 5, 40])
def test_codes_are_multiplied_exactly_and_added_in_single_precision(name, type, tokens):
    rng = np.random.default_rng(0)
    rows = random_rows(rng, type, 33, 256)
    x = quantized(random_values(rng, tokens, 256))
    with kernel(name):
        found = product(packed(type, rows, 256), x, 33)
    scales, minima = scales_and_minima(type, rows)
    dots = np.einsum("rbi,tbi->trb", stored_codes(type, rows), x.codes.reshape(tokens, -1, 32).astype(np.int64))
    terms = np.stack([dots * scales * x.scales[:, None, :], minima * x.sums[:, None, :]])
    expected = terms.sum(axis=(0, 3))
    roundings = 2 * terms.shape[3] + 1  # a sum for each term, and the product of scales
    assert np.all(np.abs(found - expected) <= roundings * EPSILON * np.abs(terms).sum(axis=(0, 3)))


@every_kernel
@every_type
@pytest.mark.parametrize("tokens", [1, 2, 5, 40])
def test_values_are_multiplied_by_the_decoded_weights(name, type, tokens):
    rng, columns = np.random.default_rng(0), whole(type, 288)
    rows = random_rows(rng, type, 33, columns)
    x = random_values(rng, tokens, columns)
    with kernel(name):
        found = product(packed(type, rows, columns), x, 33)
    terms = x.astype(np.float64)[:, None, :] * decoded(type, rows).astype(np.float64)
    assert np.all(np.abs(found - terms.sum(axis=2)) <= columns * EPSILON * np.abs(terms).sum(axis=2))


@every_kernel
def test_activations_in_int8(name):
    """The nearest of 255 codes of the block's largest magnitude; the sum is the scale's product, rounded once."""
    rng = np.random.default_rng(0)
    values = (rng.standard_normal((3, 640)) * 2.0 ** rng.integers(-60, 60, (3, 1))).astype(np.float32)
    values[0, 64:96] = 0
    values[1, :32] = np.arange(32) - 0.5  # largest 30.5
    with kernel(name):
        x = quantized(values)
    blocks = values.reshape(3, -1, 32)
    scales = np.abs(blocks).max(axis=2) / np.float32(127)
    np.testing.assert_array_equal(x.scales, scales)
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.rint(blocks * np.where(scales > 0, 1 / scales, 0).astype(np.float32)[:, :, None])
    np.testing.assert_array_equal(x.codes.reshape(3, -1, 32), codes)
    np.testing.assert_array_equal(x.sums, scales * codes.sum(axis=2).astype(np.float32))


@every_kernel
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_activations_that_are_not_finite_make_the_outputs_nan(name, value):
    values = np.ones((1, 64), np.float32)
    values[0, 40] = value
    with kernel(name):
        x = quantized(values)
        assert np.isnan(x.scales).tolist() == [[False, True]]
        assert not x.codes[0, 32:].any()
        assert np.isnan(product(packed("q4_1", np.zeros((3, 40), np.uint8), 64), x, 3)).all()


@every_kernel
def test_activations_too_small_to_have_an_inverse_become_zero(name):
    with kernel(name):
        x = quantized(np.full((1, 32), 2.0**-140, np.float32))
    assert not x.codes.any()
    assert not x.sums.any()


# Equal bits.


@every_type
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 33])
def test_tokens_together_give_the_bits_of_each_alone(type, rows):
    rng, columns = np.random.default_rng(rows), whole(type, 1056)
    matrix = packed(type, random_rows(rng, type, rows, columns), columns)
    values = random_values(rng, max(TOKEN_COUNTS), columns)
    for x in [values] if type in FLOATS else [values, quantized(values, type)]:
        alone = np.concatenate([product(matrix, _part(x, i, i + 1), rows) for i in range(len(values))])
        for tokens in TOKEN_COUNTS:
            together = product(matrix, _part(x, 0, tokens), rows)
            np.testing.assert_array_equal(bits(together), bits(alone[:tokens]))


def _part(x: np.ndarray | Codes, first: int, last: int) -> np.ndarray | Codes:
    return Codes(*(part[first:last] for part in x)) if isinstance(x, Codes) else x[first:last]


@every_type
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 70),
    blocks=st.integers(1, 5),
    tokens=st.integers(1, 12),
    scale=st.sampled_from([2.0**-130, 2.0**-20, 1.0, 2.0**60]),
)
@settings(deadline=None, max_examples=25)
def test_kernels_and_threads_agree_bit_for_bit(type, seed, rows, blocks, tokens, scale):
    rng = np.random.default_rng(seed)
    columns = WIDE.get(type, 32) * blocks
    weights = random_rows(rng, type, rows, columns)
    values = random_values(rng, tokens, columns) * np.float32(scale)
    results = []
    for name in KERNELS:
        with kernel(name):
            matrix = packed(type, weights, columns)
            for threads in (1, 3):
                found = [product(matrix, values, rows, threads)]
                if type not in FLOATS:
                    found.append(product(matrix, quantized(values, type), rows, threads))
                results.append(found)
    for result in results:
        for found, expected in zip(result, results[0], strict=True):
            np.testing.assert_array_equal(bits(found), bits(expected))


@given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(-149, 127))
@settings(deadline=None, max_examples=50)
def test_kernels_quantize_activations_alike(seed, exponent):
    rng = np.random.default_rng(seed)
    values = np.ldexp(rng.uniform(-1, 1, (2, 512)), rng.integers(exponent - 3, exponent + 1, (2, 512)))
    values = values.astype(np.float32)
    found = []
    for name in KERNELS:
        with kernel(name):
            found.append((*quantized(values), *quantized(values, "tq2_0")))
    for other in found:
        for part, expected in zip(other, found[0], strict=True):
            assert part.tobytes() == expected.tobytes()


# Rows.


@every_type
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 33])
def test_rows_read_back_as_they_decode(type, rows):
    columns = whole(type, 96)
    raw = random_rows(np.random.default_rng(rows), type, rows, columns)
    matrix = packed(type, raw, columns)
    found = np.empty((rows, columns), np.float32)
    for row in range(rows):
        matrix.read_row(row, found[row : row + 1])
    np.testing.assert_array_equal(bits(found), bits(decoded(type, raw)))


@every_type
def test_rows_may_come_in_any_pieces(type):
    rng, columns = np.random.default_rng(0), whole(type, 64)
    raw = random_rows(rng, type, 50, columns)
    x = random_values(rng, 2, columns)
    expected = product(packed(type, raw, columns), x, 50)
    for first in [(1,), (15, 16, 17), (7, 33, 49), tuple(range(1, 50))]:
        np.testing.assert_array_equal(bits(product(packed(type, raw, columns, first), x, 50)), bits(expected))


@every_kernel
@every_type
@pytest.mark.parametrize("tokens", [1, 20])
def test_a_range_of_groups_writes_its_rows_and_no_others(name, type, tokens):
    rng, columns = np.random.default_rng(0), whole(type, 64)
    x = random_values(rng, tokens, columns)
    with kernel(name):
        matrix = packed(type, random_rows(rng, type, 77, columns), columns)
        all_groups = product(matrix, x, 77)
        for first, last in [(0, 1), (1, 4), (4, 5), (2, 2)]:
            out = np.full((tokens, 77), 7, np.float32)
            matrix.multiply_values(_core.ThreadPool(1), x, out, first, last)
            expected = np.full_like(out, 7)
            expected[:, 16 * first : 16 * last] = all_groups[:, 16 * first : 16 * last]
            np.testing.assert_array_equal(out, expected)


# Errors.


def test_requests_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="unknown weight type 'q3_k'"):
        _core.PackedMatrix("q3_k", 1, 32)
    with pytest.raises(ValueError, match="40 columns are not a multiple of 32"):
        _core.PackedMatrix("q4_1", 1, 40)
    with pytest.raises(ValueError, match="cannot have 0 rows"):
        _core.PackedMatrix("q4_1", 0, 32)
    matrix = _core.PackedMatrix("q4_1", 3, 32)
    with pytest.raises(ValueError, match="no rows 2 to 4 in a matrix of 3"):
        matrix.fill(2, np.zeros((2, 20), np.uint8))
    with pytest.raises(ValueError, match=r"rows has shape \[1, 19\]; expected \[1, 20\]"):
        matrix.fill(0, np.zeros((1, 19), np.uint8))
    with pytest.raises(ValueError, match="cannot use 0 threads"):
        _core.ThreadPool(0)
    pool = _core.ThreadPool(1)
    with pytest.raises(ValueError, match=r"out has shape \[2, 3\]; expected \[1, 3\]"):
        matrix.multiply_values(pool, np.zeros((1, 32), np.float32), np.zeros((2, 3), np.float32), 0, 1)
    with pytest.raises(ValueError, match="no groups 0 to 2 in a matrix of 1"):
        matrix.multiply_values(pool, np.zeros((1, 32), np.float32), np.zeros((1, 3), np.float32), 0, 2)
    x = quantized(np.zeros((1, 32), np.float32))
    x.codes[0, 5] = -128
    with pytest.raises(ValueError, match="a code is -128"):
        matrix.multiply_codes(pool, *x, np.zeros((1, 3), np.float32), 0, 1)
