"""Block formats on tensors: torch arithmetic, the native core and gguf agree to the last byte."""

from __future__ import annotations

import platform
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from weight_rows import (
    every_device,
    every_format,
    float_denormal,
    gaussian,
    gguf_blocks,
    gguf_weights,
    heavy_tailed,
    native_blocks,
    reduced_formats,
)

from quantlab import native
from quantlab.errors import InputError
from quantlab.formats import FORMATS, format_named
from quantlab.formats.arithmetic import dequantize_torch, quantize_torch


def torch_blocks(weights: np.ndarray, format, device: str = "cpu") -> np.ndarray:
    return quantize_torch(torch.from_numpy(weights).to(device), format).cpu().numpy()


def constant(rng: np.random.Generator) -> np.ndarray:
    return np.repeat(rng.standard_normal((40, 1)), 256, axis=1).astype(np.float32)


def zero(rng: np.random.Generator) -> np.ndarray:
    return np.zeros((3, 64), np.float32)


def negative_zero(rng: np.random.Generator) -> np.ndarray:
    return np.full((3, 64), -0.0, np.float32)


def half_denormal(rng: np.random.Generator) -> np.ndarray:
    """Scales below 2**-14, which half precision stores in steps of 2**-24, down to zero."""
    return (rng.standard_normal((40, 256)) * 2.0 ** -rng.uniform(10, 30, (40, 1))).astype(np.float32)


def grid_valued(rng: np.random.Generator) -> np.ndarray:
    """Multiples of an eighth: equal magnitudes of both signs, and weights exactly between two codes."""
    return (rng.integers(-16, 17, (200, 256)) / 8).astype(np.float32)


def signed_zeros(rng: np.random.Generator) -> np.ndarray:
    """Blocks whose minimum is a zero of either sign; the first one counts."""
    return rng.choice(np.array([0.0, -0.0, 1.0], np.float32), (40, 256))


def one_outlier(rng: np.random.Generator) -> np.ndarray:
    """One large weight in each block, so that the others fall on few codes."""
    weights = rng.normal(0, 0.02, (40, 8, 32)).astype(np.float32)
    weights[:, :, 5] = rng.choice([-30, 30], (40, 8))
    return weights.reshape(40, 256)


def beyond_half_precision(rng: np.random.Generator) -> np.ndarray:
    """Scales above 65504, which half precision stores as infinity (`BlockFormat.quantize` refuses them)."""
    return (1e8 * rng.standard_normal((40, 256))).astype(np.float32)


# numpy leaves open which of two zeros is a minimum and, but for x86, which code infinity is: native and torch agree.
OPEN_IN_GGUF = [float_denormal, signed_zeros]
DEFINED_IN_GGUF = [
    gaussian,
    heavy_tailed,
    constant,
    zero,
    negative_zero,
    half_denormal,
    grid_valued,
    one_outlier,
    beyond_half_precision,
]


# The table.


@pytest.mark.parametrize(
    ("name", "bits_per_weight"), [("q4_0", 4.5), ("q4_1", 5.0), ("q5_0", 5.5), ("q5_1", 6.0), ("q8_0", 8.5)]
)
def test_each_format_is_ggmls_type_of_that_name(name, bits_per_weight):
    format = FORMATS[name]
    ggml_type = gguf.GGMLQuantizationType[name.upper()]
    assert (format.name, format.ggml_type) == (name, ggml_type)
    assert (format.block_size, format.block_bytes) == gguf.GGML_QUANT_SIZES[ggml_type]
    assert format.bits_per_weight == bits_per_weight
    assert format.row_bytes(96) == 3 * format.block_bytes
    assert format.columns(format.row_bytes(96)) == 96


def test_formats_are_found_by_name_in_any_case():
    assert format_named("Q4_1") is FORMATS["q4_1"]


def test_an_unknown_format_is_answered_with_those_there_are():
    with pytest.raises(
        InputError, match="unknown format 'q3_k'; choose one of: q4_0, q4_1, q5_0, q5_1, q8_0, tq2_0, ternary"
    ):
        format_named("q3_k")


# Three arithmetics, one result.


@every_device
@every_format
@pytest.mark.parametrize("rows", DEFINED_IN_GGUF)
def test_torch_blocks_are_the_native_ones_and_ggufs(rows, format, device):
    weights = rows(np.random.default_rng(0))
    blocks = torch_blocks(weights, format, device)
    np.testing.assert_array_equal(blocks, native_blocks(weights, format))
    np.testing.assert_array_equal(blocks, gguf_blocks(weights, format))


@every_device
@every_format
@pytest.mark.parametrize("rows", OPEN_IN_GGUF)
def test_torch_blocks_are_the_native_ones_where_gguf_is_undefined(rows, format, device):
    weights = rows(np.random.default_rng(0))
    np.testing.assert_array_equal(torch_blocks(weights, format, device), native_blocks(weights, format))


@every_format
@pytest.mark.skipif(platform.machine() != "x86_64", reason="numpy's codes of infinity are the processor's")
def test_denormal_rows_have_ggufs_blocks(format):
    weights = float_denormal(np.random.default_rng(0))
    np.testing.assert_array_equal(torch_blocks(weights, format), gguf_blocks(weights, format))


any_rows = arrays(np.float32, (2, 64), elements=st.floats(-(2.0**100), 2.0**100, width=32))
near_rows = arrays(np.float32, (2, 64), elements=st.floats(-4, 4, width=16))  # many ties


@every_format
def test_zeros_of_both_signs_have_the_same_torch_and_native_blocks(format):
    """The first of several equal extremes decides the sign of a zero scale and minimum."""
    weights = np.zeros((4, 64), np.float32)
    weights[0, 24], weights[1, :24], weights[2, 1::2], weights[3, ::2] = -0.0, -0.0, -0.0, -0.0
    np.testing.assert_array_equal(torch_blocks(weights, format), native_blocks(weights, format))


@every_format
@given(weights=any_rows | near_rows)
@settings(deadline=None, max_examples=60, derandomize=True)
def test_any_rows_have_the_same_torch_and_native_blocks(format, weights):
    np.testing.assert_array_equal(torch_blocks(weights, format), native_blocks(weights, format))


@every_format
@given(weights=any_rows | near_rows)
@settings(deadline=None, max_examples=60, derandomize=True)
def test_any_rows_have_ggufs_blocks(format, weights):
    weights = np.where(np.abs(weights) < 2.0**-90, np.float32(0), weights)  # without what numpy leaves open
    np.testing.assert_array_equal(torch_blocks(weights, format), gguf_blocks(weights, format))


@reduced_formats
@pytest.mark.parametrize("rows", [*DEFINED_IN_GGUF, *OPEN_IN_GGUF])
def test_fewer_levels_give_the_same_torch_and_native_blocks(rows, format):
    weights = rows(np.random.default_rng(1))
    np.testing.assert_array_equal(torch_blocks(weights, format), native_blocks(weights, format))


@pytest.mark.parametrize("levels", [2, 5, 16])
def test_levels_are_the_number_of_values_a_block_takes(levels):
    """A ramp over one block meets every code: its weights are `levels` equal steps from the minimum to the maximum."""
    ramp = torch.linspace(-1, 1, 32)[None]
    weights = replace(FORMATS["q4_1"], levels=levels).quantize(ramp).dequantize()
    steps = torch.from_numpy(np.float32(-1) + np.arange(levels, dtype=np.float32) * np.float16(2 / (levels - 1)))
    assert torch.equal(weights.unique(), steps)


def random_blocks(format, rows: int) -> np.ndarray:
    """Blocks of any codes and any finite scales."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (rows, format.block_bytes), dtype=np.uint8)
    halves = rng.integers(0, 0x7C00, (rows, format.scale_bytes.stop // 2), dtype=np.uint16)
    halves |= rng.integers(0, 2, halves.shape, dtype=np.uint16) << 15
    blocks[:, format.scale_bytes] = halves.view(np.uint8)
    return blocks.reshape(rows // 4, -1)


@every_device
@every_format
def test_torch_decodes_any_blocks_as_the_native_core_and_gguf_do(format, device):
    blocks = random_blocks(format, 2000)
    weights = dequantize_torch(torch.from_numpy(blocks).to(device), format).cpu().numpy()
    np.testing.assert_array_equal(weights.view(np.uint32), native.dequantize(format.name, blocks).view(np.uint32))
    np.testing.assert_array_equal(weights.view(np.uint32), gguf_weights(blocks, format).view(np.uint32))
