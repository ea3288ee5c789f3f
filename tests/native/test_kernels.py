"""All element types and kernels give the same bytes, weights and sums."""

from __future__ import annotations

import math

import gguf
import numpy as np
import pytest
from forced_kernel import can_run, kernel
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from quantlab import native
from quantlab.errors import InputError

LEVELS = {"q4_0": 16, "q4_1": 16, "q5_0": 32, "q5_1": 32, "q8_0": 255}
BLOCK_BYTES = {"q4_0": 18, "q4_1": 20, "q5_0": 22, "q5_1": 24, "q8_0": 34}
FEWER = {"q4_0": 7, "q4_1": 8, "q5_0": 31, "q5_1": 12, "q8_0": 15}
BITS = {"f32": np.uint32, "f16": np.uint16, "bf16": np.uint16}
INFINITY = {"f32": 0x7F800000, "f16": 0x7C00, "bf16": 0x7F80}

every_format = pytest.mark.parametrize("format", LEVELS)
every_element = pytest.mark.parametrize("element", BITS)


KERNELS = [name for name in ("scalar", "avx2") if can_run(name)]
every_kernel = pytest.mark.parametrize("name", KERNELS)
two_kernels = pytest.mark.skipif(len(KERNELS) < 2, reason="this processor has the portable kernel only")


def bits_of(weights: np.ndarray, element: str) -> np.ndarray:
    """float32 weights as bits of an element type; bfloat16 by cutting off, which is a rounding like any other here."""
    if element == "bf16":
        return (weights.view(np.uint32) >> 16).astype(np.uint16)
    return weights.astype({"f32": np.float32, "f16": np.float16}[element]).view(BITS[element])


def values_of(bits: np.ndarray, element: str) -> np.ndarray:
    """What the bits stand for, in float32."""
    if element == "bf16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view({"f32": np.float32, "f16": np.float16}[element]).astype(np.float32)


def gguf_blocks(weights: np.ndarray, format: str) -> np.ndarray:
    with np.errstate(all="ignore"):  # numpy warns of its own overflows
        return gguf.quants.quantize(weights, gguf.GGMLQuantizationType[format.upper()])


def gguf_weights(blocks: np.ndarray, format: str) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[format.upper()])


def measured(name: str, format: str, bits: np.ndarray, element: str, levels: int | None = None, threads: int = 1):
    with kernel(name):
        levels = LEVELS[format] if levels is None else levels
        return native.quantize_checked(format, bits, levels, element=element, threads=threads)


def gaussian(rows: int = 40, columns: int = 256, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.02, (rows, columns)).astype(np.float32)


def random_blocks(format: str, rows: int = 3000) -> np.ndarray:
    """Blocks of any bytes: scales and minima may be infinite or NaN."""
    return np.random.default_rng(0).integers(0, 256, (rows, 4 * BLOCK_BYTES[format]), dtype=np.uint8)


def assert_same_weights(ours: np.ndarray, theirs: np.ndarray, element: str) -> None:
    """Bit for bit, but for what is in a NaN."""
    is_nan = (ours & ~BITS[element](1 << (8 * ours.itemsize - 1))) > INFINITY[element]
    their_nan = (theirs & ~BITS[element](1 << (8 * theirs.itemsize - 1))) > INFINITY[element]
    np.testing.assert_array_equal(is_nan, their_nan)
    np.testing.assert_array_equal(np.where(is_nan, 0, ours), np.where(is_nan, 0, theirs))


# Element types.


@every_format
@every_element
@every_kernel
def test_weights_of_every_type_have_ggufs_blocks(format, element, name):
    bits = bits_of(gaussian(), element)
    np.testing.assert_array_equal(
        measured(name, format, bits, element).blocks, gguf_blocks(values_of(bits, element), format)
    )


@every_kernel
@pytest.mark.parametrize("element", ["f16", "bf16"])
def test_every_number_of_16_bits_is_read_exactly(element, name):
    """A constant row's minimum is its weight in half precision."""
    numbers = np.arange(1 << 16, dtype=np.uint16)
    numbers = numbers[(numbers & 0x7FFF) < INFINITY[element]]
    blocks = measured(name, "q4_1", np.repeat(numbers[:, None], 32, axis=1), element).blocks
    with np.errstate(over="ignore"):
        expected = values_of(numbers, element).astype(np.float16).view(np.uint16)
    np.testing.assert_array_equal(blocks[:, 2:4].copy().view(np.uint16)[:, 0], expected)


@every_element
def test_weights_may_come_as_bits_or_bytes_at_any_address(element):
    bits = bits_of(gaussian(3), element)
    expected = native.quantize("q5_1", bits, 32, element=element)
    raw = bits.view(np.uint8)
    shifted = np.frombuffer(b"\0" + raw.tobytes(), np.uint8, offset=1).reshape(raw.shape)
    np.testing.assert_array_equal(native.quantize("q5_1", raw, 32, element=element), expected)
    np.testing.assert_array_equal(native.quantize("q5_1", shifted, 32, element=element), expected)
    if element != "bf16":
        floats = bits.view({"f32": np.float32, "f16": np.float16}[element])
        np.testing.assert_array_equal(native.quantize("q5_1", floats, 32), expected)


def test_what_is_not_the_element_is_refused():
    with pytest.raises(TypeError, match="weights of type float32 are not f16, its bits or its bytes"):
        native.quantize("q4_1", np.zeros((1, 32), np.float32), 16, element="f16")
    with pytest.raises(TypeError, match="weights of type uint16 are not f32, its bits or its bytes"):
        native.quantize("q4_1", np.zeros((1, 32), np.uint16), 16, element="f32")
    with pytest.raises(ValueError, match="unknown element type 'f64'; expected one of f32, f16, bf16"):
        native.quantize("q4_1", np.zeros((1, 32)), 16, element="f64")
    with pytest.raises(ValueError, match="unknown element type 'f64'; expected one of f32, f16, bf16"):
        native.dequantize("q4_1", np.zeros((1, 20), np.uint8), element="f64")
    with pytest.raises(ValueError, match="f16 weights have 65 bytes a row; expected a multiple of 2"):
        native.quantize("q4_1", np.zeros((1, 65), np.uint8), 16, element="f16", out=np.zeros((1, 20), np.uint8))


def nearest_brain(weights: np.ndarray) -> np.ndarray:
    """The bits of the nearer of the two bfloat16 around each float32, the even one on a tie, by exact differences."""
    lower = weights.view(np.uint32) >> 16  # towards zero
    exact = np.abs(weights.astype(np.float64))
    around = [np.abs(((lower + i) << 16).view(np.float32).astype(np.float64)) for i in range(2)]
    around[1][np.isinf(around[1])] = 2.0**128  # where the next number would be, were there no infinity
    down, up = exact - around[0], around[1] - exact
    return (lower + ((up < down) | ((up == down) & (lower % 2 == 1)))).astype(np.uint16)


@every_format
@every_kernel
def test_decoded_weights_are_rounded_to_nearest_with_ties_to_even(format, name):
    blocks = random_blocks(format)
    decoded = gguf_weights(blocks, format)
    finite = np.isfinite(decoded)
    with kernel(name), np.errstate(over="ignore"):
        halves = native.dequantize(format, blocks, element="f16")
        brains = native.dequantize(format, blocks, element="bf16")
        assert (halves.dtype, brains.dtype) == (np.float16, np.uint16)
        np.testing.assert_array_equal(
            halves.view(np.uint16)[finite], decoded.astype(np.float16).view(np.uint16)[finite]
        )
    np.testing.assert_array_equal(brains[finite], nearest_brain(decoded[finite]))
    assert np.isnan(halves[np.isnan(decoded)]).all()
    assert np.isnan(values_of(brains[np.isnan(decoded)], "bf16")).all()


# Kernels.


def raw_bits(element: str):
    """Any numbers at all, and numbers close together: subnormals, and halves and quarters with many ties."""
    bits, largest = BITS[element], INFINITY[element]
    sign = 1 << (8 * bits(0).itemsize - 1)
    tiny = st.integers(0, 40) | st.integers(sign, sign + 40)
    near = st.integers(-16, 16).map(lambda i: int(bits_of(np.float32([i / 8]), element)[0]))
    finite = st.integers(0, largest - 1) | st.integers(sign, sign + largest - 1)
    anything = st.integers(0, 2 * sign - 1)
    return st.one_of(*(arrays(bits, (2, 64), elements=kind) for kind in (tiny, near, finite, anything)))


@two_kernels
@every_format
@every_element
@given(data=st.data())
@settings(deadline=None, max_examples=60, derandomize=True)
def test_kernels_encode_any_numbers_alike(format, element, data):
    bits = data.draw(raw_bits(element))
    levels = data.draw(st.sampled_from([LEVELS[format], FEWER[format]]))
    scalar, avx2 = (measured(name, format, bits, element, levels) for name in KERNELS)
    np.testing.assert_array_equal(scalar.blocks, avx2.blocks)
    assert (scalar.not_finite, scalar.overflow) == (avx2.not_finite, avx2.overflow)
    np.testing.assert_array_equal(scalar.sums, avx2.sums)  # counts NaN as equal to NaN


@two_kernels
@every_format
@every_element
def test_kernels_encode_many_numbers_alike(format, element):
    """Random bits, of which only every second half-precision block is finite, and the same bits at one exponent."""
    rng = np.random.default_rng(0)
    wide = rng.integers(0, 1 << (8 * BITS[element](0).itemsize), (400, 512), dtype=BITS[element], endpoint=False)
    narrow = bits_of(rng.integers(-64, 65, (400, 512)).astype(np.float32) * np.float32(2.0**-6), element)
    for bits in (wide, narrow):
        scalar, avx2 = (measured(name, format, bits, element) for name in KERNELS)
        np.testing.assert_array_equal(scalar.blocks, avx2.blocks)
        np.testing.assert_array_equal(scalar.sums, avx2.sums)
        assert (scalar.not_finite, scalar.overflow) == (avx2.not_finite, avx2.overflow)


@two_kernels
@every_format
@every_element
def test_kernels_decode_any_blocks_alike(format, element):
    decoded = []
    for name in KERNELS:
        with kernel(name):
            decoded.append(native.dequantize(format, random_blocks(format), element=element).view(BITS[element]))
    assert_same_weights(*decoded, element)


def test_an_unknown_kernel_is_named(monkeypatch):
    monkeypatch.setenv("QUANTLAB_CPU_KERNEL", "sse9")
    message = "^QUANTLAB_CPU_KERNEL=sse9: there is no such kernel; set it to one of scalar, avx2, avx512, or unset it$"
    for use in (
        native.cpu_kernel,
        lambda: native.quantize("q4_1", np.zeros((1, 32), np.float32), 16),
        lambda: native.dequantize("q4_1", np.zeros((1, 20), np.uint8)),
    ):
        with pytest.raises(InputError, match=message):
            use()


def test_the_fastest_kernel_is_the_default(monkeypatch):
    fastest = next(name for name in ("avx512", "avx2", "scalar") if can_run(name))
    monkeypatch.delenv("QUANTLAB_CPU_KERNEL", raising=False)
    assert native.cpu_kernel() == fastest
    monkeypatch.setenv("QUANTLAB_CPU_KERNEL", "")
    assert native.cpu_kernel() == fastest


# Sums.


@every_format
@every_element
@every_kernel
def test_sums_are_those_of_double_precision(format, element, name):
    bits = bits_of(gaussian(7, 608), element)
    weights = values_of(bits, element)
    found = measured(name, format, bits, element)
    errors = (gguf_weights(gguf_blocks(weights, format), format) - weights).astype(np.float64)
    expected = [[math.fsum(row**2) for row in (errors[i], weights[i].astype(np.float64))] for i in range(7)]
    np.testing.assert_allclose(found.sums, expected, rtol=1e-14)
    norm = np.linalg.norm(errors) / np.linalg.norm(weights.astype(np.float64))
    assert found.relative_error == pytest.approx(norm, rel=1e-12)


@every_kernel
def test_sums_by_hand(name):
    """Codes of two levels are -1, 0 and 1 steps of 4: weights 4 and 3 become 4 and 4, -1 becomes 0."""
    weights = np.zeros((2, 32), np.float32)
    weights[1, 7:10] = 4, 3, -1
    found = measured(name, "q8_0", weights, "f32", levels=3)
    np.testing.assert_array_equal(found.sums, [[0, 0], [1 + 1, 16 + 9 + 1]])
    assert found.relative_error == math.sqrt(2 / 26)


@every_kernel
def test_sums_hold_the_squares_of_the_smallest_and_the_largest_weights(name):
    weights = np.zeros((2, 32), np.float32)
    weights[0, 0] = 2.0**-149  # its scale is zero in half precision
    weights[1] = 60000.0
    weights[1, ::2] = -60000.0
    sums = measured(name, "q8_0", weights, "f32").sums
    assert sums[0].tolist() == [2.0**-298, 2.0**-298]
    assert sums[1, 1] == 32 * 60000.0**2


def test_the_error_of_zeros_is_zero_and_an_unmeasured_one_is_refused():
    zeros = np.zeros((2, 32), np.float32)
    assert native.quantize_checked("q4_0", zeros, 16).relative_error == 0.0
    unmeasured = native.quantize_checked("q4_0", zeros, 16, measure=False)
    assert unmeasured.sums is None
    with pytest.raises(ValueError, match="the rounding error was not measured"):
        _ = unmeasured.relative_error


@pytest.mark.parametrize("rows_at_a_time", [1, 2, 5, 11])
def test_a_matrix_measured_in_parts_has_the_same_error(rows_at_a_time):
    weights = gaussian(11, 96) * np.float32(10.0) ** np.arange(-5, 6, dtype=np.float32)[:, None]
    whole = native.quantize_checked("q4_1", weights, 16)
    parts = [
        native.quantize_checked("q4_1", weights[i : i + rows_at_a_time], 16).sums for i in range(0, 11, rows_at_a_time)
    ]
    assert native.relative_error(np.concatenate(parts)) == whole.relative_error
