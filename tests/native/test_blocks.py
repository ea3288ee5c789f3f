"""The native block formats give gguf's bytes, decode as gguf does, and name what is wrong with a bad request."""

from __future__ import annotations

import platform
from collections.abc import Iterator

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from quantlab.errors import InputError
from quantlab.native import cpu_kernel, dequantize, quantize

Weights = npt.NDArray[np.float32]
Blocks = npt.NDArray[np.uint8]

LEVELS = {"q4_0": 16, "q4_1": 16, "q5_0": 32, "q5_1": 32, "q8_0": 255}
BLOCK_BYTES = {"q4_0": 18, "q4_1": 20, "q5_0": 22, "q5_1": 24, "q8_0": 34}
ZERO_CODE = {"q4_0": 8, "q4_1": 0, "q5_0": 16, "q5_1": 0, "q8_0": 0}  # the stored code that decodes as 0 steps
AFFINE = ("q4_1", "q5_1")
HALF_ONE = (0x00, 0x3C)  # 1.0 in half precision, little-endian

every_format = pytest.mark.parametrize("format", LEVELS)


@pytest.fixture(scope="module", autouse=True, params=["scalar", "avx2"])
def kernel(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test holds for each kernel."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUANTLAB_CPU_KERNEL", request.param)
        try:
            assert cpu_kernel() == request.param
        except InputError:
            pytest.skip(f"no {request.param} on this processor")
        yield


def gguf_quantize(format: str, weights: Weights) -> Blocks:
    """gguf's bytes; numpy warns of its own overflows."""
    with np.errstate(all="ignore"):
        return gguf.quants.quantize(weights, gguf.GGMLQuantizationType[format.upper()])


def gguf_dequantize(format: str, blocks: Blocks) -> Weights:
    return gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[format.upper()])


def header_bytes(format: str) -> int:
    """A block opens with its scale and, if affine, its minimum: two bytes each."""
    return 4 if format in AFFINE else 2


def single_blocks(format: str, blocks: Blocks) -> Blocks:
    return blocks.reshape(-1, BLOCK_BYTES[format]).copy()


def stored_codes(format: str, blocks: Blocks) -> npt.NDArray[np.int64]:
    """The codes in the blocks, read by decoding them with scale 1 and minimum 0."""
    plain = single_blocks(format, blocks)
    plain[:, : header_bytes(format)] = 0
    plain[:, :2] = HALF_ONE
    return dequantize(format, plain).astype(np.int64) + ZERO_CODE[format]


def gaussian(rng: np.random.Generator) -> Weights:
    return rng.normal(0, 0.02, (40, 256)).astype(np.float32)


def heavy_tailed(rng: np.random.Generator) -> Weights:
    return rng.standard_t(2, (40, 256)).astype(np.float32)


def beyond_half_precision(rng: np.random.Generator) -> Weights:
    """Scales above 65504, which half precision stores as infinity."""
    return (1e8 * rng.standard_normal((40, 256))).astype(np.float32)


def half_subnormal(rng: np.random.Generator) -> Weights:
    """Scales below 2**-14, which half precision stores in steps of 2**-24, down to zero."""
    return (rng.standard_normal((40, 256)) * 2.0 ** -rng.uniform(10, 30, (40, 1))).astype(np.float32)


def constant(rng: np.random.Generator) -> Weights:
    return np.repeat(rng.standard_normal((40, 1)), 256, axis=1).astype(np.float32)


def zero(rng: np.random.Generator) -> Weights:
    return np.zeros((3, 64), np.float32)


def negative_zero(rng: np.random.Generator) -> Weights:
    return np.full((3, 64), -0.0, np.float32)


def grid_valued(rng: np.random.Generator) -> Weights:
    """Multiples of an eighth: equal magnitudes of both signs and weights exactly between two codes."""
    return (rng.integers(-16, 17, (200, 256)) / 8).astype(np.float32)


def one_outlier(rng: np.random.Generator) -> Weights:
    """One large weight in each block, so that the others fall on few codes."""
    weights = rng.normal(0, 0.02, (40, 8, 32)).astype(np.float32)
    weights[:, :, 5] = rng.choice([-30, 30], (40, 8))
    return weights.reshape(40, 256)


ROWS = [
    gaussian,
    heavy_tailed,
    beyond_half_precision,
    half_subnormal,
    constant,
    zero,
    negative_zero,
    grid_valued,
    one_outlier,
]


# Encoding: gguf's bytes.


@every_format
@pytest.mark.parametrize("rows", ROWS)
def test_blocks_are_ggufs_bytes(format, rows):
    weights = rows(np.random.default_rng(0))
    np.testing.assert_array_equal(quantize(format, weights, LEVELS[format]), gguf_quantize(format, weights))


def plain_weights(rows: Weights) -> Weights:
    """Without what numpy leaves open: a negative zero among zeros, and ranges too small to have an fp32 inverse."""
    return np.where(np.abs(rows) < 2.0**-90, np.float32(0), rows)


@every_format
@given(rows=arrays(np.float32, (2, 64), elements=st.floats(-(2.0**100), 2.0**100, width=32)))
@settings(deadline=None, max_examples=40)
def test_any_rows_are_ggufs_bytes(format, rows):
    weights = plain_weights(rows)
    np.testing.assert_array_equal(quantize(format, weights, LEVELS[format]), gguf_quantize(format, weights))


@every_format
@pytest.mark.parametrize("exponent", [-149, -140, -130, -127])
def test_rows_without_an_inverse_are_ggufs_bytes(format, exponent):
    """Below about 2**-128 the inverse of the scale is beyond fp32. All codes are 0 then, as numpy's cast gives on x86;
    the scale is zero in half precision, so that on any processor the weights decode as gguf's do.
    """
    rng = np.random.default_rng(0)
    weights = (rng.standard_normal((20, 64)) * 2.0**exponent).astype(np.float32)
    weights[:, 3] = 0  # zero times infinity
    ours, theirs = quantize(format, weights, LEVELS[format]), gguf_quantize(format, weights)
    np.testing.assert_array_equal(dequantize(format, ours), gguf_dequantize(format, theirs))
    if platform.machine() == "x86_64":
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("format", AFFINE)
@pytest.mark.parametrize("first", [0.0, -0.0])
def test_the_first_zero_gives_the_sign_of_the_minimum(format, first):
    """numpy's minimum takes either zero; here the first wins."""
    weights = np.ones((1, 32), np.float32)
    weights[0, 7:9] = first, -first
    minimum = quantize(format, weights, LEVELS[format])[0, 2:4].copy().view(np.float16)[0]
    assert minimum == 0
    assert np.signbit(minimum) == np.signbit(first)


def test_halves_are_rounded_to_nearest_with_ties_to_even():
    """Every point half-way between two neighbouring halves, and the floats beside it; a constant row stores itself."""
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    following = np.append(halves[1:], np.float32(65536))  # where the next half would be, were there no infinity
    midpoints = (halves + following) / 2
    values = np.concatenate([midpoints, np.nextafter(midpoints, np.float32(0)), np.nextafter(midpoints, following)])
    values = np.concatenate([values, -values])
    stored = quantize("q4_1", np.repeat(values[:, None], 32, axis=1), 16)[:, 2:4].copy().view(np.uint16)[:, 0]
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(stored, values.astype(np.float16).view(np.uint16))


# Decoding: gguf's weights, bit for bit.


@every_format
def test_random_blocks_decode_to_ggufs_weights(format):
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (2000, BLOCK_BYTES[format]), dtype=np.uint8)
    header = header_bytes(format)
    finite = rng.integers(0, 0x7C00, (2000, header // 2), dtype=np.uint16) | (
        rng.integers(0, 2, (2000, header // 2), dtype=np.uint16) << 15
    )
    blocks[:, :header] = finite.view(np.uint8)
    ours, theirs = dequantize(format, blocks), gguf_dequantize(format, blocks)
    np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32))


def test_every_finite_half_decodes_exactly():
    halves = np.arange(0x7C00, dtype=np.uint16)
    halves = np.concatenate([halves, halves | 0x8000])
    blocks = np.ones((len(halves), 34), np.uint8)  # codes of 1: the weight is the scale
    blocks[:, :2] = halves[:, None].view(np.uint8)
    expected = halves.view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(dequantize("q8_0", blocks)[:, 31].view(np.uint32), expected.view(np.uint32))


@every_format
def test_blocks_may_lie_at_any_address(format):
    """A row of a mapped file can start at an odd byte."""
    weights = gaussian(np.random.default_rng(0))
    blocks = quantize(format, weights, LEVELS[format])
    shifted = np.frombuffer(b"\0" + blocks.tobytes(), np.uint8, offset=1).reshape(blocks.shape)
    np.testing.assert_array_equal(dequantize(format, shifted), dequantize(format, blocks))


# Fewer levels than the format's own.


def expected_codes(format: str, block: Weights, levels: int) -> npt.NDArray[np.int64]:
    """The codes of one block by definition, every step in fp32."""
    largest = block[np.abs(block).argmax()]
    if format == "q8_0":
        position = block * (1 / (np.abs(largest) / np.float32((levels - 1) // 2)))
        return (np.sign(position) * np.floor(np.abs(position) + 0.5)).astype(np.int64)
    if format in AFFINE:
        inverse = 1 / ((block.max() - block.min()) / np.float32(levels - 1))
        return np.trunc((block - block.min()) * inverse + np.float32(0.5)).clip(0, levels - 1).astype(np.int64)
    half = levels // 2
    code = np.trunc(block * (1 / (largest / np.float32(-half))) + np.float32(half + 0.5)).clip(0, levels - 1)
    return code.astype(np.int64) + ZERO_CODE[format] - half


REDUCED = [(format, levels) for format, own in LEVELS.items() for levels in (3, 4, 7, 8, 15, 31, 127) if levels < own]


@pytest.mark.parametrize(("format", "levels"), REDUCED)
def test_fewer_levels_use_the_same_arithmetic(format, levels):
    weights = heavy_tailed(np.random.default_rng(1))[:10]
    codes = stored_codes(format, quantize(format, weights, levels))
    expected = [expected_codes(format, block, levels) for block in weights.reshape(-1, 32)]
    np.testing.assert_array_equal(codes, expected)


@pytest.mark.parametrize(("format", "levels"), REDUCED)
@pytest.mark.parametrize("rows", ROWS)
def test_fewer_levels_keep_codes_in_range(format, levels, rows):
    """`levels` neighbouring codes at most, around the code of zero where the format is symmetric."""
    codes = stored_codes(format, quantize(format, rows(np.random.default_rng(2)), levels))
    lowest = {"q8_0": -((levels - 1) // 2)}.get(format, ZERO_CODE[format] and ZERO_CODE[format] - levels // 2)
    assert codes.min() >= lowest
    assert codes.max() < lowest + levels


# Shapes and errors.


@every_format
@pytest.mark.parametrize("shape", [(1, 32), (3, 96), (0, 32), (2, 0)])
def test_shapes_and_types(format, shape):
    blocks = quantize(format, np.zeros(shape, np.float32), LEVELS[format])
    assert blocks.dtype == np.uint8
    assert blocks.shape == (shape[0], shape[1] // 32 * BLOCK_BYTES[format])
    weights = dequantize(format, blocks)
    assert weights.dtype == np.float32
    assert weights.shape == shape


@every_format
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_block_with_a_weight_that_is_not_finite_decodes_to_nan(format, value):
    """Scale NaN and zeros; the blocks beside it are untouched."""
    weights = gaussian(np.random.default_rng(0))
    spoilt = weights.copy()
    spoilt[0, 63] = value
    spoilt[1, 32:64] = value
    ours = single_blocks(format, quantize(format, spoilt, LEVELS[format]))
    expected = single_blocks(format, quantize(format, weights, LEVELS[format]))
    touched = [1, 9]  # eight blocks a row
    expected[touched] = 0
    expected[touched, :2] = 0x00, 0x7E  # NaN in half precision, little-endian
    np.testing.assert_array_equal(ours, expected)
    assert np.isnan(dequantize(format, ours[touched])).all()


def test_unknown_format():
    message = "unknown block format 'q3_k'; expected one of q4_0, q4_1, q5_0, q5_1, q8_0, tq2_0"
    with pytest.raises(ValueError, match=message):
        quantize("q3_k", np.zeros((1, 32), np.float32), 8)
    with pytest.raises(ValueError, match=message):
        dequantize("q3_k", np.zeros((1, 18), np.uint8))


@every_format
def test_columns_that_are_not_whole_blocks(format):
    with pytest.raises(ValueError, match=f"{format} weights have 40 columns; expected a multiple of 32"):
        quantize(format, np.zeros((2, 40), np.float32), LEVELS[format])


@every_format
def test_row_bytes_that_are_not_whole_blocks(format):
    size = BLOCK_BYTES[format]
    with pytest.raises(ValueError, match=f"{format} blocks have {size + 1} bytes a row; expected a multiple of {size}"):
        dequantize(format, np.zeros((2, size + 1), np.uint8))


@every_format
def test_levels_out_of_range(format):
    fewest, most = (3 if format == "q8_0" else 2), LEVELS[format]
    for levels in (-1, 0, fewest - 1, most + 1, 2**40):
        with pytest.raises(ValueError, match=f"{format} cannot use {levels} levels; expected {fewest} to {most}"):
            quantize(format, np.zeros((1, 32), np.float32), levels)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        pytest.param(np.zeros((1, 32), np.float64), "float64 need float32, float16, or `element`", id="float64"),
        pytest.param(np.zeros((1, 32), np.uint16), "uint16 need float32, float16, or `element`", id="bits"),
        pytest.param(np.zeros(32, np.float32), r"shape \[32\] must be two-dimensional", id="one dimension"),
        pytest.param(np.zeros((32, 64), np.float32).T, "C-contiguous", id="transposed"),
        pytest.param(np.zeros((2, 64), np.float32)[:, :32], "C-contiguous", id="columns of a wider array"),
    ],
)
def test_weights_of_another_type_or_layout_are_not_copied(weights, message):
    with pytest.raises(TypeError, match=message):
        quantize("q4_1", weights, 16)


@pytest.mark.parametrize(
    "blocks",
    [
        pytest.param(np.zeros((1, 20), np.int8), id="int8"),
        pytest.param(np.zeros(20, np.uint8), id="one dimension"),
        pytest.param(np.zeros((20, 20), np.uint8).T, id="transposed"),
    ],
)
def test_blocks_of_another_type_or_layout_are_not_copied(blocks):
    with pytest.raises(TypeError, match=r"blocks: expected a C-contiguous array of uint8 \[rows, row bytes\]"):
        dequantize("q4_1", blocks)
