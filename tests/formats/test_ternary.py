"""Ternary blocks: torch arithmetic and the native core find the same scale and codes, and gguf the same bytes."""

from __future__ import annotations

import math

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from weight_rows import every_device, gguf_blocks, gguf_weights

from quantlab import native
from quantlab.errors import InputError
from quantlab.formats import FORMATS, arithmetic, format_named, ternary
from quantlab.formats.arithmetic import dequantize_torch, quantize_torch
from quantlab.formats.packing import TensorScale, pack_rows
from quantlab.formats.parts import codes_of, scales_of, with_codes, with_scales

FORMAT = FORMATS["tq2_0"]
HALF_MAX = 65504.0
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)


def gaussian(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(0, 0.02, (7, 768)).astype(np.float32)


def heavy_tailed(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_t(2, (5, 1024)).astype(np.float32)


def with_empty_blocks(rng: np.random.Generator) -> np.ndarray:
    """Blocks whose weights are all below half of the scale: they store none."""
    weights = gaussian(rng)
    weights[::2, :256] /= 1000
    weights[3] = 0
    return weights


def grid_valued(rng: np.random.Generator) -> np.ndarray:
    """Few values, many of them equal: no scale is far from one of them."""
    return (rng.integers(-4, 5, (6, 512)) / 4).astype(np.float32)


def tiny(rng: np.random.Generator) -> np.ndarray:
    """A scale that fp16 stores in steps of 2**-24, about as large as the epsilon that is added to it."""
    return (rng.standard_normal((4, 512)) * 1e-6).astype(np.float32)


def vanishing(rng: np.random.Generator) -> np.ndarray:
    """One weight among very small ones: the mean is zero in fp16."""
    weights = (rng.standard_normal((4, 512)) * 1e-10).astype(np.float32)
    weights[2, 100] = 1e-5
    return weights


def zero(rng: np.random.Generator) -> np.ndarray:
    return np.where(rng.random((3, 256)) < 0.5, np.float32(0), np.float32(-0.0))


def large(rng: np.random.Generator) -> np.ndarray:
    return (rng.standard_normal((9, 256)) * 7e4).astype(np.float32)


every_kind = pytest.mark.parametrize(
    "rows", [gaussian, heavy_tailed, with_empty_blocks, grid_valued, tiny, vanishing, zero, large]
)


def scale_by_definition(weights: np.ndarray) -> float:
    """The mean magnitude, added without rounding."""
    return float(np.float16(np.float32(math.fsum(np.abs(weights.ravel()).tolist()) / weights.size)))


def rounded_by_division(weights: np.ndarray, gamma: float) -> np.ndarray:
    """RoundClip(W / (gamma + eps), -1, 1) * gamma as BitNet b1.58 writes it."""
    if gamma == 0:
        return np.zeros_like(weights)
    steps = np.clip(np.rint(weights / (np.float32(gamma) + np.float32(1e-5))), -1, 1)
    return (steps * np.float32(gamma)).astype(np.float32) + np.float32(0)  # no -0.0


# The table.


def test_the_row_says_what_ggml_says():
    assert (FORMAT.block_size, FORMAT.block_bytes) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.TQ2_0]
    assert FORMAT.ggml_type == gguf.GGMLQuantizationType.TQ2_0
    assert FORMAT.bits_per_weight == 2.0625
    assert (FORMAT.row_bytes(768), FORMAT.columns(198)) == (198, 768)
    assert (FORMAT.scale_of, FORMAT.activations) == ("tensor", "token")
    assert [FORMAT.fits(shape) for shape in ((3, 256), (3, 128), (0, 256), (256,))] == [True, False, False, False]
    assert format_named("Ternary") is format_named("TQ2_0") is FORMAT


def test_there_are_no_fewer_levels():
    assert FORMAT.with_levels(None) is FORMAT
    assert FORMAT.with_levels(3) == FORMAT
    for levels in (2, 4, 16):
        message = f"^tq2_0 cannot use {levels} levels: it has 3; leave out the levels$"
        with pytest.raises(InputError, match=message):
            FORMAT.with_levels(levels)


# Arithmetic.


@every_device
@every_kind
def test_torch_and_native_give_the_bytes_that_gguf_writes_for_the_rounded_weights(rows, device):
    weights = rows(np.random.default_rng(0))
    gamma = scale_by_definition(weights)
    expected = gguf_blocks(rounded_by_division(weights, gamma), FORMAT)
    packed = native.quantize_ternary(weights)
    assert packed.scale == gamma
    np.testing.assert_array_equal(packed.blocks, expected)
    in_torch = quantize_torch(torch.from_numpy(weights).to(device), FORMAT).cpu().numpy()
    np.testing.assert_array_equal(in_torch, expected)


@every_device
@every_kind
def test_both_decode_to_the_scale_times_the_codes(rows, device):
    weights = rows(np.random.default_rng(1))
    packed = native.quantize_ternary(weights)
    expected = rounded_by_division(weights, scale_by_definition(weights))
    np.testing.assert_array_equal(gguf_weights(packed.blocks, FORMAT), expected)
    np.testing.assert_array_equal(native.dequantize("tq2_0", packed.blocks), expected)
    blocks = torch.from_numpy(packed.blocks).to(device)
    np.testing.assert_array_equal(dequantize_torch(blocks, FORMAT).cpu().numpy(), expected)


@every_device
def test_any_bytes_decode_as_in_gguf(device):
    """Also the code 3, which nobody writes, and scales that differ from block to block and have signs."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (500, 66), dtype=np.uint8)
    halves = rng.integers(0, 0x7C00, 500, dtype=np.uint16) | rng.integers(0, 2, 500, dtype=np.uint16) << 15
    blocks[:, 64:] = halves[:, None].view(np.uint8)
    blocks = blocks.reshape(100, -1)
    expected = gguf_weights(blocks, FORMAT)
    np.testing.assert_array_equal(native.dequantize("tq2_0", blocks), expected)
    on_device = torch.from_numpy(blocks).to(device)
    np.testing.assert_array_equal(dequantize_torch(on_device, FORMAT).cpu().numpy(), expected)


@given(weights=arrays(np.float32, (2, 512), elements=st.floats(-(2.0**14), 2.0**14, width=32)))
@settings(deadline=None, max_examples=60, derandomize=True)
def test_any_weights_have_the_same_torch_and_native_blocks(weights):
    packed = native.quantize_ternary(weights)
    np.testing.assert_array_equal(quantize_torch(torch.from_numpy(weights), FORMAT).numpy(), packed.blocks)
    assert ternary.tensor_scale(ternary.magnitude_sums(torch.from_numpy(weights), FORMAT), FORMAT) == packed.scale


def test_a_weight_is_zero_up_to_the_threshold():
    """Half of the scale and epsilon in fp32; next to it the code is 1."""
    weights = np.full((1, 256), 0.5, np.float32)
    threshold = np.float32(0.5) * (np.float32(0.5) + np.float32(1e-5))
    weights[0, :4] = [threshold, np.nextafter(threshold, 1), -threshold, np.nextafter(-threshold, -1)]
    weights[0, 4:8] = [0.75, 0.75, 0.75, 0.75]  # so that the mean stays 0.5
    packed = native.quantize_ternary(weights)
    assert packed.scale == 0.5
    assert native.dequantize("tq2_0", packed.blocks)[0, :5].tolist() == [0, 0.5, 0, -0.5, 0.5]


# On tensors.


@every_device
@every_dtype
def test_weights_of_any_float_type_are_packed_as_their_fp32_values(dtype, device):
    weights = torch.from_numpy(heavy_tailed(np.random.default_rng(0))).to(dtype)
    expected = native.quantize_ternary(weights.to(torch.float32).numpy()).blocks
    packed = FORMAT.quantize(weights.to(device))
    assert packed.shape == (5, 1024)
    np.testing.assert_array_equal(packed.blocks.cpu().numpy(), expected)
    assert torch.equal(packed.dequantize(dtype).cpu(), torch.from_numpy(gguf_weights(expected, FORMAT)).to(dtype))


@pytest.mark.parametrize("chunk", [1, 2000, 1 << 22])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_scale_is_the_whole_tensors_however_it_is_cut(monkeypatch, dtype, chunk):
    monkeypatch.setattr(arithmetic, "CHUNK_ELEMENTS", chunk)
    weights = torch.from_numpy(heavy_tailed(np.random.default_rng(0)).T.copy()).to(dtype)[:1024, :5]
    wide = weights.T  # [5, 1024], not contiguous
    expected = native.quantize_ternary(wide.to(torch.float32).contiguous().numpy()).blocks
    np.testing.assert_array_equal(FORMAT.quantize(wide).blocks.numpy(), expected)


def test_fake_quantize_is_dequantize_of_quantize_and_passes_gradients_through():
    weight = torch.from_numpy(gaussian(np.random.default_rng(0))).requires_grad_()
    fake = FORMAT.fake_quantize(weight)
    assert torch.equal(fake, FORMAT.quantize(weight).dequantize())
    upstream = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    fake.backward(upstream)
    assert torch.equal(weight.grad, upstream)


@every_device
def test_bad_weights_are_named(device):
    bad = torch.ones(4, 512, device=device)
    bad[2, 300] = float("nan")
    with pytest.raises(InputError, match=r"^w: row 2, column 300 is nan; the checkpoint is damaged$"):
        FORMAT.quantize(bad, "w")
    overflow = "^w: the tq2_0 scale, the mean magnitude of its weights, overflows fp16; leave this tensor unquantized$"
    with pytest.raises(InputError, match=overflow):
        FORMAT.quantize(torch.full((4, 512), -65520.0, device=device), "w")
    assert FORMAT.quantize(torch.full((4, 512), -65519.0, device=device), "w").dequantize().unique() == -HALF_MAX
    with pytest.raises(
        InputError, match=r"^w: shape .4, 128. cannot be packed as tq2_0: .* rows of a multiple of 256 are"
    ):
        FORMAT.quantize(torch.ones(4, 128, device=device), "w")


# Rows from a file.


@pytest.mark.parametrize("step", [1, 3, 7])
def test_rows_are_packed_in_parts_by_the_scale_of_them_all(step):
    weights = with_empty_blocks(np.random.default_rng(0)).astype(np.float16)
    whole = pack_rows(weights, FORMAT, "w")
    scale = TensorScale(FORMAT, "w")
    for start in range(0, 7, step):
        scale.add(weights[start : start + step])
    assert scale.value() == whole.scale
    parts = [pack_rows(weights[i : i + step], FORMAT, "w", first_row=i, scale=scale.value()) for i in range(0, 7, step)]
    np.testing.assert_array_equal(np.concatenate([part.blocks for part in parts]), whole.blocks)
    np.testing.assert_array_equal(np.concatenate([part.sums for part in parts]), whole.sums)


def test_bad_rows_are_named_by_their_place_in_the_tensor():
    weights = np.ones((4, 512), np.float32)
    scale = TensorScale(FORMAT, "w")
    scale.add(weights)
    weights[3, 511] = -np.inf
    with pytest.raises(InputError, match=r"^w: row 7, column 511 is -inf; the checkpoint is damaged$"):
        scale.add(weights)
    with pytest.raises(InputError, match=r"^w: row 13, column 511 is -inf; the checkpoint is damaged$"):
        pack_rows(weights, FORMAT, "w", first_row=10)
    scale = TensorScale(FORMAT, "w")
    scale.add(np.full((4, 512), 1e5, np.float32))
    with pytest.raises(InputError, match="overflows fp16"):
        scale.value()


# Parts.


def test_blocks_come_apart_and_together_again():
    blocks = FORMAT.quantize(torch.from_numpy(with_empty_blocks(np.random.default_rng(0)))).blocks
    d, m = scales_of(blocks, FORMAT)
    codes = codes_of(blocks, FORMAT)
    assert m is None
    assert codes.unique().tolist() == [-1, 0, 1]
    assert torch.equal(d.repeat_interleave(256, dim=1) * codes, FORMAT.dequantize(blocks))
    assert torch.equal(with_codes(blocks, FORMAT, codes), blocks)
    assert torch.equal(with_scales(blocks, FORMAT, d, None), blocks)
    one_scale = torch.full_like(d, float(d.max()))
    assert torch.equal(with_scales(blocks, FORMAT, one_scale, None), blocks)  # none where all codes are 0
    turned = with_codes(blocks, FORMAT, -codes)
    assert torch.equal(codes_of(turned, FORMAT), -codes)
