"""Ternary weights by activations, to the last bit: the formula in numpy, where one rounding is one rounding."""

from __future__ import annotations

import numpy as np
import pytest
from forced_kernel import can_run, kernel

from quantlab import native
from quantlab.native import _core

BLOCK, BLOCK_BYTES = 256, 66
ROWS, COLUMNS = 37, 3 * BLOCK
TOKENS = (1, 2, 4, 5, 11)

every_kernel = pytest.mark.parametrize("name", [name for name in ("scalar", "avx2", "avx512") if can_run(name)])


def random_blocks(rng: np.random.Generator, rows: int = ROWS, columns: int = COLUMNS) -> np.ndarray:
    """Any bytes for codes, so also the code 3 that no writer uses, and scales of moderate size, of either sign."""
    blocks = rng.integers(0, 256, (rows, columns // BLOCK, BLOCK_BYTES), dtype=np.uint8)
    blocks[:, :, 64:] = rng.normal(0, 0.02, (rows, columns // BLOCK, 1)).astype(np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


def random_values(rng: np.random.Generator, tokens: int, columns: int = COLUMNS) -> np.ndarray:
    return rng.normal(0, 1, (tokens, columns)).astype(np.float32)


def parts(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int64 [rows, blocks, 256] of codes less 1, and fp32 [rows, blocks] scales."""
    by_block = blocks.reshape(len(blocks), -1, BLOCK_BYTES)
    halves = by_block[:, :, :64].reshape(len(blocks), -1, 2, 1, 32)
    planes = halves >> np.array([0, 2, 4, 6], np.uint8).reshape(4, 1) & 3
    scales = np.ascontiguousarray(by_block[:, :, 64:]).view(np.float16)[:, :, 0].astype(np.float32)
    return planes.reshape(len(blocks), -1, BLOCK).astype(np.int64) - 1, scales


def rounded_once(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c of fp32 arrays, rounded once to fp32.

    The product is exact in double precision. The sum is rounded to odd there (Boldo and Melquiond 2008, "Emulation of a
    FMA and correctly rounded sums"), so that rounding it again loses nothing.
    """
    product, addend = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = product + addend
    added = total - product
    error = (product - (total - added)) + (addend - added)
    is_even = (total.view(np.int64) & 1) == 0
    odd = np.nextafter(total, np.copysign(np.inf, error))
    return np.where((error != 0) & is_even, odd, total).astype(np.float32)


def rounded_activations(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int64 codes [tokens, columns] and fp32 scales [tokens]."""
    scales = np.abs(values).max(axis=1) / np.float32(127)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / scales
    inverse[np.isinf(inverse)] = 0
    return np.rint(values * inverse[:, None]).astype(np.int64), scales


def expected_of_codes(blocks: np.ndarray, values: np.ndarray) -> np.ndarray:
    """fp32 [tokens, rows]."""
    (ternary, scales), (codes, token_scales) = parts(blocks), rounded_activations(values)
    by_block = codes.reshape(len(values), -1, BLOCK)
    result = np.zeros((len(values), len(blocks)), np.float32)
    for block in range(by_block.shape[1]):
        dots = (by_block[:, block] @ ternary[:, block].T).astype(np.float32)
        result = rounded_once(dots, scales[None, :, block] * token_scales[:, None], result)
    return result


def expected_of_values(blocks: np.ndarray, values: np.ndarray) -> np.ndarray:
    """fp32 [tokens, rows]."""
    ternary, scales = parts(blocks)
    weights = (scales[:, :, None] * ternary.astype(np.float32)).reshape(len(blocks), -1)
    result = np.zeros((len(values), len(blocks)), np.float32)
    for column in range(values.shape[1]):
        result = rounded_once(weights[None, :, column], values[:, column, None], result)
    return result


def packed(blocks: np.ndarray) -> _core.PackedMatrix:
    matrix = _core.PackedMatrix("tq2_0", len(blocks), blocks.shape[1] // BLOCK_BYTES * BLOCK)
    matrix.fill(0, blocks)
    return matrix


def quantized(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    tokens, columns = values.shape
    x = (
        np.empty((tokens, columns), np.int8),
        np.empty((tokens, 1), np.float32),
        np.empty((tokens, columns // BLOCK), np.float32),
    )
    _core.quantize_rows(values, *x)
    return x


def by_codes(matrix: _core.PackedMatrix, values: np.ndarray, rows: int, threads: int = 1) -> np.ndarray:
    out = np.full((len(values), rows), np.nan, np.float32)
    matrix.multiply_codes(_core.ThreadPool(threads), *quantized(values), out, 0, matrix.groups)
    return out


def bits(values: np.ndarray) -> np.ndarray:
    return values.view(np.uint32)


def test_one_rounding_is_one_rounding():
    """Just below half-way between two numbers of fp32, where double precision already sees the half."""
    a, b, c = (np.array([x], np.float32) for x in (1 + 2.0**-18, 2.0**-24 * (1 - 2.0**-18), 1 + 2.0**-23))
    assert rounded_once(a, b, c) == c
    assert (a.astype(np.float64) * b + c).astype(np.float32) > c


@every_kernel
@pytest.mark.parametrize("tokens", TOKENS)
def test_codes_give_the_bits_of_the_formula(name, tokens):
    rng = np.random.default_rng(tokens)
    blocks, values = random_blocks(rng), random_values(rng, tokens)
    expected = expected_of_codes(blocks, values)
    with kernel(name):
        np.testing.assert_array_equal(bits(by_codes(packed(blocks), values, ROWS)), bits(expected))
        np.testing.assert_array_equal(bits(native.multiply_int8("tq2_0", blocks, values)), bits(expected))


@every_kernel
@pytest.mark.parametrize("tokens", [1, 5])
def test_values_give_the_bits_of_the_formula(name, tokens):
    rng = np.random.default_rng(tokens)
    blocks, values = random_blocks(rng), random_values(rng, tokens)
    with kernel(name):
        matrix, found = packed(blocks), np.empty((tokens, ROWS), np.float32)
        matrix.multiply_values(_core.ThreadPool(1), values, found, 0, matrix.groups)
    np.testing.assert_array_equal(bits(found), bits(expected_of_values(blocks, values)))


@every_kernel
@pytest.mark.parametrize("byte", [0x00, 0x55, 0xAA, 0xFF])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_are_exact(name, byte, sign):
    """All codes alike, all activations at their end, in one block of d = 1."""
    blocks = np.full((16, BLOCK_BYTES), byte, np.uint8)
    blocks[:, 64:] = np.array([1], np.float16).view(np.uint8)
    values = np.full((5, BLOCK), sign * 127, np.float32)
    with kernel(name):
        found = by_codes(packed(blocks), values, 16)
    np.testing.assert_array_equal(found, np.full((5, 16), sign * 127 * 256 * ((byte & 3) - 1), np.float32))


@every_kernel
def test_activations_are_rounded_by_token(name):
    rng = np.random.default_rng(0)
    values = random_values(rng, 7) * (2.0 ** rng.integers(-100, 100, (7, 1))).astype(np.float32)
    values[1] = 0
    values[2] = 2.0**-140  # its scale has no inverse in fp32
    values[4] = np.arange(COLUMNS) % 255 / 2  # codes of ties alone, with scale 1
    values[4, 0] = 127
    with kernel(name):
        codes, scales, sums = quantized(values)
    expected, expected_scales = rounded_activations(values)
    np.testing.assert_array_equal(scales[:, 0], expected_scales)
    np.testing.assert_array_equal(codes, expected)
    np.testing.assert_array_equal(sums, expected.reshape(7, -1, BLOCK).sum(axis=2))
    assert not codes[1:3].any()
    assert codes[4, :6].tolist() == [127, 0, 1, 2, 2, 2]  # 0.5, 1, 1.5, 2, 2.5: ties go to even


@every_kernel
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 300, COLUMNS - 1])
def test_a_token_that_is_not_finite_spoils_itself_alone(name, value, place):
    rng = np.random.default_rng(0)
    blocks, values = random_blocks(rng), random_values(rng, 3)
    blocks[4:] = 0  # rows of zeros, whose scales are zero
    with kernel(name):
        expected = by_codes(packed(blocks), values, ROWS)
        values[1, place] = value
        codes, scales, _ = quantized(values)
        for found in (by_codes(packed(blocks), values, ROWS), native.multiply_int8("tq2_0", blocks, values)):
            assert np.isnan(found[1]).all()
            np.testing.assert_array_equal(found[[0, 2]], expected[[0, 2]])
    assert np.isnan(scales[:, 0]).tolist() == [False, True, False]
    assert not codes[1].any()


@pytest.mark.parametrize("tokens", [1, 9])
def test_threads_and_tokens_do_not_matter(tokens):
    rng = np.random.default_rng(0)
    blocks, values = random_blocks(rng, 150), random_values(rng, 9)
    matrix = packed(blocks)
    expected = by_codes(matrix, values, 150)
    for threads in (1, 2, 5):
        np.testing.assert_array_equal(bits(by_codes(matrix, values[:tokens], 150, threads)), bits(expected[:tokens]))


def test_what_quantlab_quantizes_multiplies_as_it_decodes():
    """Blocks of zeros among them, and no code 3."""
    rng = np.random.default_rng(0)
    weights = rng.normal(0, 0.02, (ROWS, COLUMNS)).astype(np.float32)
    weights[3, :BLOCK] = 0
    blocks, values = native.quantize_ternary(weights).blocks, random_values(rng, 4)
    codes, scales = rounded_activations(values)
    rounded = codes * scales[:, None].astype(np.float64)
    decoded = native.dequantize("tq2_0", blocks).astype(np.float64)
    found = native.multiply_int8("tq2_0", blocks, values)
    bound = 4 * 2.0**-24 * (np.abs(rounded) @ np.abs(decoded).T)  # a product of scales, three sums
    assert np.all(np.abs(found - rounded @ decoded.T) <= bound)
    np.testing.assert_array_equal(bits(found), bits(expected_of_codes(blocks, values)))


def test_requests_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="288 columns are not a multiple of 256"):
        _core.PackedMatrix("tq2_0", 1, 288)
    with pytest.raises(ValueError, match="tq2_0 blocks have 60 bytes a row; expected a multiple of 66"):
        native.multiply_int8("tq2_0", np.zeros((3, 60), np.uint8), np.zeros((1, 256), np.float32))
    with pytest.raises(ValueError, match=r"values has shape \[1, 512\]; expected \[1, 256\]"):
        native.multiply_int8("tq2_0", np.zeros((3, 66), np.uint8), np.zeros((1, 512), np.float32))
    matrix, pool, out = _core.PackedMatrix("tq2_0", 3, 512), _core.ThreadPool(1), np.zeros((2, 3), np.float32)
    codes, scales, sums = quantized(np.ones((2, 512), np.float32))
    with pytest.raises(ValueError, match=r"rows has shape \[3, 66\]; expected \[3, 132\]"):
        matrix.fill(0, np.zeros((3, 66), np.uint8))
    with pytest.raises(ValueError, match=r"scales has shape \[2, 2\]; expected \[2, 1\]"):
        matrix.multiply_codes(pool, codes, sums, sums, out, 0, 1)
    with pytest.raises(ValueError, match=r"sums has shape \[2, 1\]; expected \[2, 2\]"):
        matrix.multiply_codes(pool, codes, scales, scales, out, 0, 1)
    codes[1, 7] = -128
    with pytest.raises(ValueError, match="a code is -128"):
        matrix.multiply_codes(pool, codes, scales, sums, out, 0, 1)
    with pytest.raises(ValueError, match="96 columns are not a multiple of 256"):
        _core.quantize_rows(np.ones((1, 96), np.float32), codes, scales, sums)
