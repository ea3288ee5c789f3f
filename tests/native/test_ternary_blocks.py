"""Ternary blocks in the native core: one scale a tensor, the same for any threads, kernel and element type."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from quantlab import native
from quantlab.errors import InputError

SHAPES = ((1, 256), (3, 768), (70, 4096))  # the last has work for several threads


@pytest.fixture(autouse=True, params=["scalar", "avx2"])
def kernel(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test holds for each kernel."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUANTLAB_CPU_KERNEL", request.param)
        try:
            assert native.cpu_kernel() == request.param
        except InputError:
            pytest.skip(f"no {request.param} on this processor")
        yield


def some_weights(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    weights = np.random.default_rng(seed).normal(0, 0.02, shape).astype(np.float32)
    weights[:, :256:3] = 0
    return weights


def stored(weights: np.ndarray, element: str) -> np.ndarray:
    """As a file holds them; bfloat16 by cutting off."""
    if element == "bf16":
        return (weights.view(np.uint32) >> 16).astype(np.uint16)
    return weights.astype({"f32": np.float32, "f16": np.float16}[element])


def fp32(raw: np.ndarray, element: str) -> np.ndarray:
    return (raw.astype(np.uint32) << 16).view(np.float32) if element == "bf16" else raw.astype(np.float32)


def halved(numbers: np.ndarray) -> np.ndarray:
    """Sums along the last axis, the upper half added to the lower until one is left."""
    while numbers.shape[-1] > 1:
        half = numbers.shape[-1] // 2
        numbers = numbers[..., :half] + numbers[..., half:]
    return numbers[..., 0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("element", ["f32", "f16", "bf16"])
def test_magnitudes_are_added_by_halving(element, shape):
    raw = stored(some_weights(shape), element)
    by_block = np.abs(fp32(raw, element)).astype(np.float64).reshape(shape[0], -1, 256)
    sums = native.magnitude_sums(raw, element=element, threads=3)
    np.testing.assert_array_equal(sums, halved(by_block))
    padded = np.zeros(1 << (sums.size - 1).bit_length())
    padded[: sums.size] = sums.ravel()
    mean = float(halved(padded)) / raw.size
    assert native.ternary_scale(sums) == float(np.float16(np.float32(mean))) > 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("element", ["f32", "f16", "bf16"])
def test_threads_and_parts_change_nothing(element, shape):
    raw = stored(some_weights(shape), element)
    one = native.quantize_ternary(raw, element=element, threads=1)
    three = native.quantize_ternary(raw, element=element, threads=3)
    known = native.quantize_ternary(raw, one.scale, element=element, threads=2)
    for other in (three, known):
        np.testing.assert_array_equal(other.blocks, one.blocks)
        np.testing.assert_array_equal(other.sums, one.sums)
        assert other.scale == one.scale
    assert native.quantize_ternary(raw, element=element, measure=False).sums is None


@pytest.mark.parametrize("element", ["f32", "f16", "bf16"])
def test_sums_are_those_of_errors_and_weights(element):
    raw = stored(some_weights((5, 768)), element)
    packed = native.quantize_ternary(raw, element=element)
    weights = fp32(raw, element)
    errors = (native.dequantize("tq2_0", packed.blocks) - weights).astype(np.float64)
    expected = np.stack([np.square(errors).sum(axis=1), np.square(weights.astype(np.float64)).sum(axis=1)], axis=1)
    np.testing.assert_allclose(packed.sums, expected, rtol=1e-13)
    assert 0.3 < packed.relative_error < 0.8


@pytest.mark.parametrize("element", ["f32", "f16", "bf16"])
def test_decoded_weights_are_rounded_to_the_element(element):
    blocks = native.quantize_ternary(some_weights((5, 768))).blocks
    weights = native.dequantize("tq2_0", blocks, element=element)
    exact = native.dequantize("tq2_0", blocks)
    if element == "bf16":
        spread = exact.view(np.uint32)
        rounded = (spread + 0x7FFF + ((spread >> 16) & 1)) >> 16
        np.testing.assert_array_equal(weights, rounded.astype(np.uint16))
    else:
        np.testing.assert_array_equal(weights, exact.astype(weights.dtype))


def test_weights_that_are_not_finite_are_found_and_decode_to_nan():
    weights = some_weights((70, 4096))
    weights[33, 300] = np.inf
    weights[40, 0] = np.nan
    packed = native.quantize_ternary(weights, threads=2)
    assert (packed.not_finite, packed.overflow) == ((33, 300), None)
    assert np.isnan(native.dequantize("tq2_0", packed.blocks)).all()
    sums = native.magnitude_sums(weights)
    assert (np.isfinite(sums).sum(), np.isinf(sums[33, 1]), np.isnan(sums[40, 0])) == (70 * 16 - 2, True, True)
    assert np.isnan(native.ternary_scale(sums))


def test_a_scale_beyond_half_precision_is_told():
    packed = native.quantize_ternary(np.full((2, 512), 65520, np.float32))
    assert (packed.not_finite, packed.overflow, packed.scale) == (None, (0, 0), np.inf)
    assert np.isnan(native.dequantize("tq2_0", packed.blocks)).all()
    assert native.quantize_ternary(np.full((2, 512), 65519, np.float32)).scale == 65504


@pytest.mark.parametrize("shape", [(0, 256), (3, 0)])
def test_nothing_has_no_scale(shape):
    packed = native.quantize_ternary(np.empty(shape, np.float32))
    assert (packed.blocks.shape, packed.scale) == ((shape[0], shape[1] // 256 * 66), 0)


def test_bad_arguments_are_named():
    weights = some_weights((2, 512))
    for columns in (32, 255, 257):
        with pytest.raises(ValueError, match=f"{columns} columns; expected a multiple of 256, those of one block"):
            native.quantize_ternary(np.zeros((2, columns), np.float32))
        with pytest.raises(ValueError, match=f"{columns} columns; expected a multiple of 256, those of one block"):
            native.magnitude_sums(np.zeros((2, columns), np.float32))
    for scale in (-1.0, float("nan"), float("inf"), 0.1, 1e-9, 1e9):
        with pytest.raises(ValueError, match=r"^scale is .*; expected a finite number of half precision, at least 0$"):
            native.quantize_ternary(weights, scale)
    with pytest.raises(ValueError, match=r"^out has shape \[2, 66\]; expected \[2, 132\]$"):
        native.quantize_ternary(weights, out=np.empty((2, 66), np.uint8))
    with pytest.raises(ValueError, match="cannot use 0 threads"):
        native.quantize_ternary(weights, threads=0)
    with pytest.raises(TypeError, match="float64"):
        native.quantize_ternary(weights.astype(np.float64))
    with pytest.raises(
        ValueError, match=r"^tq2_0 has one scale a tensor; expected a format whose blocks have their own$"
    ):
        native.quantize("tq2_0", weights, 3)


def test_an_array_to_write_to_is_written_to():
    weights, out = some_weights((2, 512)), np.zeros((2, 132), np.uint8)
    assert native.quantize_ternary(weights, out=out).blocks is out
    np.testing.assert_array_equal(out, native.quantize_ternary(weights).blocks)
