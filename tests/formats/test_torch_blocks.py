"""Block formats on tensors: torch arithmetic, the native core and gguf agree to the last byte; bad input is named."""

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

from quantlab import native
from quantlab.errors import InputError
from quantlab.formats import FORMATS, PackedTensor, arithmetic, format_named
from quantlab.formats.arithmetic import dequantize_torch, quantize_torch

every_format = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
every_device = pytest.mark.parametrize("device", DEVICES)


def torch_blocks(weights: np.ndarray, format, device: str = "cpu") -> np.ndarray:
    return quantize_torch(torch.from_numpy(weights).to(device), format).cpu().numpy()


def native_blocks(weights: np.ndarray, format) -> np.ndarray:
    return native.quantize(format.name, weights, format.levels)


def gguf_blocks(weights: np.ndarray, format) -> np.ndarray:
    with np.errstate(all="ignore"):  # numpy warns of its own overflows
        return gguf.quants.quantize(weights, gguf.GGMLQuantizationType(format.ggml_type))


def gguf_weights(blocks: np.ndarray, format) -> np.ndarray:
    return gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType(format.ggml_type))


def gaussian(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(0, 0.02, (40, 256)).astype(np.float32)


def heavy_tailed(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_t(2, (40, 256)).astype(np.float32)


def constant(rng: np.random.Generator) -> np.ndarray:
    return np.repeat(rng.standard_normal((40, 1)), 256, axis=1).astype(np.float32)


def zero(rng: np.random.Generator) -> np.ndarray:
    return np.zeros((3, 64), np.float32)


def negative_zero(rng: np.random.Generator) -> np.ndarray:
    return np.full((3, 64), -0.0, np.float32)


def half_denormal(rng: np.random.Generator) -> np.ndarray:
    """Scales below 2**-14, which half precision stores in steps of 2**-24, down to zero."""
    return (rng.standard_normal((40, 256)) * 2.0 ** -rng.uniform(10, 30, (40, 1))).astype(np.float32)


def float_denormal(rng: np.random.Generator) -> np.ndarray:
    """Weights around the smallest floats, whose scales are so small that their reciprocal is beyond fp32."""
    rows = rng.standard_normal((40, 256)) * 2.0 ** rng.integers(-149, -120, (40, 1))
    rows[:, ::7] = 0  # zero times infinity
    return rows.astype(np.float32)


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
    with pytest.raises(InputError, match="unknown format 'q3_k'; choose one of: q4_0, q4_1, q5_0, q5_1, q8_0"):
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


REDUCED = [
    replace(format, levels=levels)
    for format in FORMATS.values()
    for levels in (3, 4, 7, 8, 15, 31, 127)
    if levels < format.levels
]
reduced_formats = pytest.mark.parametrize("format", REDUCED, ids=lambda format: f"{format.name}-{format.levels}")


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
    halves = rng.integers(0, 0x7C00, (rows, format.header_bytes // 2), dtype=np.uint16)
    halves |= rng.integers(0, 2, halves.shape, dtype=np.uint16) << 15
    blocks[:, : format.header_bytes] = halves.view(np.uint8)
    return blocks.reshape(rows // 4, -1)


@every_device
@every_format
def test_torch_decodes_any_blocks_as_the_native_core_and_gguf_do(format, device):
    blocks = random_blocks(format, 2000)
    weights = dequantize_torch(torch.from_numpy(blocks).to(device), format).cpu().numpy()
    np.testing.assert_array_equal(weights.view(np.uint32), native.dequantize(format.name, blocks).view(np.uint32))
    np.testing.assert_array_equal(weights.view(np.uint32), gguf_weights(blocks, format).view(np.uint32))


# The public verbs.


@every_device
@every_format
def test_quantize_gives_a_packed_tensor_of_ggufs_bytes(format, device):
    weights = gaussian(np.random.default_rng(0))
    packed = format.quantize(torch.from_numpy(weights).to(device))
    assert isinstance(packed, PackedTensor)
    assert packed.format is format
    assert (packed.shape, packed.nbytes) == ((40, 256), 40 * 8 * format.block_bytes)
    assert packed.blocks.device.type == device
    expected = gguf_blocks(weights, format)
    np.testing.assert_array_equal(packed.blocks.cpu().numpy(), expected)
    np.testing.assert_array_equal(packed.dequantize().cpu().numpy(), gguf_weights(expected, format))


@every_format
@every_dtype
def test_dequantize_computes_in_fp32_and_casts_to_the_dtype(format, dtype):
    blocks = torch.from_numpy(gguf_blocks(heavy_tailed(np.random.default_rng(0)), format))
    expected = torch.from_numpy(gguf_weights(blocks.numpy(), format)).to(dtype)
    weights = format.dequantize(blocks, dtype)
    assert weights.dtype == dtype
    assert torch.equal(weights, expected)


@every_format
def test_dequantize_keeps_leading_dimensions_even_empty_ones(format):
    """An embedding looks rows up by ids of any shape."""
    blocks = torch.from_numpy(gguf_blocks(gaussian(np.random.default_rng(0)), format))
    rows = format.dequantize(blocks)
    assert torch.equal(format.dequantize(blocks.reshape(5, 4, 2, -1)), rows.reshape(5, 4, 2, 256))
    assert torch.equal(format.dequantize(blocks[7]), rows[7])
    assert format.dequantize(blocks[:0]).shape == (0, 256)


@every_format
@every_dtype
def test_weights_of_any_float_type_are_packed_as_their_fp32_values(format, dtype):
    weights = torch.from_numpy(heavy_tailed(np.random.default_rng(0))).to(dtype)
    np.testing.assert_array_equal(
        format.quantize(weights).blocks.numpy(), gguf_blocks(weights.to(torch.float32).numpy(), format)
    )


@every_format
@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda weights: weights.T, id="transposed"),
        pytest.param(lambda weights: weights[::2, 64:128], id="part of a wider tensor"),
        pytest.param(lambda weights: weights[:1].expand(4, -1), id="one row, expanded"),
    ],
)
def test_strided_weights_and_blocks_count_by_value(format, view):
    weights = view(torch.from_numpy(gaussian(np.random.default_rng(0))[:32]))
    assert not weights.is_contiguous()
    packed = format.quantize(weights)
    np.testing.assert_array_equal(packed.blocks.numpy(), gguf_blocks(weights.contiguous().numpy(), format))
    strided = packed.blocks.T.contiguous().T
    assert torch.equal(format.dequantize(strided), packed.dequantize())


@every_format
@pytest.mark.parametrize("chunk", [1, 3 * 96, 4 * 96 - 1, 10 * 96])
@pytest.mark.parametrize(
    "weights",
    [
        pytest.param(lambda weights: weights.to(torch.float64), id="float64"),
        pytest.param(lambda weights: weights.to(torch.bfloat16).T.contiguous().T, id="transposed"),
    ],
)
def test_what_must_be_converted_or_gathered_goes_some_rows_at_a_time(format, chunk, weights, monkeypatch):
    """One, three, three and all ten rows here."""
    rows = weights(torch.from_numpy(heavy_tailed(np.random.default_rng(0))[:10, :96]))
    monkeypatch.setattr(arithmetic, "CHUNK_ELEMENTS", chunk)
    expected = gguf_blocks(rows.to(torch.float32).contiguous().numpy(), format)
    np.testing.assert_array_equal(format.quantize(rows).blocks.numpy(), expected)


@every_format
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_torchs_number_of_threads_changes_no_byte(format, threads):
    weights = torch.from_numpy(np.random.default_rng(0).standard_normal((243, 2048), dtype=np.float32))
    blocks = gguf_blocks(weights.numpy(), format)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        packed = format.quantize(weights)
        np.testing.assert_array_equal(packed.blocks.numpy(), blocks)
        np.testing.assert_array_equal(packed.dequantize().numpy(), gguf_weights(blocks, format))
    finally:
        torch.set_num_threads(before)


@every_format
def test_subnormals_count_even_where_torch_flushes_them(format):
    weights = torch.from_numpy(float_denormal(np.random.default_rng(0)))
    expected = native_blocks(weights.numpy(), format)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor flushes no subnormals")
    try:
        blocks = format.quantize(weights).blocks
        assert float(torch.tensor(2.0**-149) + torch.tensor(2.0**-149)) == 0  # flushed still, as torch was told
    finally:
        torch.set_flush_denormal(False)
    np.testing.assert_array_equal(blocks.numpy(), expected)


def test_quantize_leaves_the_weights_alone():
    weights = torch.from_numpy(gaussian(np.random.default_rng(0)))
    before = weights.clone()
    FORMATS["q4_1"].quantize(weights)
    FORMATS["q4_1"].fake_quantize(weights)
    assert torch.equal(weights, before)


# Fake quantization: what training sees is what is written.


@every_format
@every_dtype
def test_fake_quantize_is_dequantize_of_quantize(format, dtype):
    weights = torch.from_numpy(heavy_tailed(np.random.default_rng(0))).to(dtype)
    blocks = gguf_blocks(weights.to(torch.float32).numpy(), format)
    fake = format.fake_quantize(weights)
    assert fake.dtype == dtype
    assert torch.equal(fake, torch.from_numpy(gguf_weights(blocks, format)).to(dtype))
    assert not torch.equal(fake, weights)


@reduced_formats
def test_fake_quantize_knows_reduced_levels(format):
    weights = torch.from_numpy(gaussian(np.random.default_rng(0)))
    assert torch.equal(format.fake_quantize(weights), format.quantize(weights).dequantize())


@every_format
@every_dtype
def test_gradients_pass_straight_through_fake_quantize(format, dtype):
    rng = np.random.default_rng(0)
    weights = torch.from_numpy(gaussian(rng)).to(dtype).requires_grad_()
    gradient = torch.from_numpy(gaussian(rng)).to(dtype)
    format.fake_quantize(weights).backward(gradient)
    assert torch.equal(weights.grad, gradient)


# Errors.


@every_format
@every_dtype
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named_by_tensor_row_and_column(format, dtype, value, monkeypatch):
    monkeypatch.setattr(arithmetic, "CHUNK_ELEMENTS", 2 * 64)  # the row is not in the first chunk
    weights = torch.zeros(6, 64, dtype=dtype)
    weights[5, 40] = value
    with pytest.raises(InputError, match=f"^layer.weight: row 5, column 40 is {value}; the checkpoint is damaged$"):
        format.quantize(weights, "layer.weight")


# The largest weight that a format can scale: 65519 rounds to the largest half, 65520 to infinity.
STEPS = {"q4_0": 8, "q4_1": 15, "q5_0": 16, "q5_1": 31, "q8_0": 127}


@every_format
def test_the_largest_scale_that_fp16_holds_is_packed(format):
    weights = torch.zeros(1, 32)
    weights[0, 9] = 65519 * STEPS[format.name]
    assert format.quantize(weights).dequantize()[0, 9].abs() == 65504 * STEPS[format.name]


@every_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)  # fp16 reaches no such scale
def test_a_scale_that_overflows_fp16_is_named_by_tensor_row_and_columns(format, dtype, monkeypatch):
    monkeypatch.setattr(arithmetic, "CHUNK_ELEMENTS", 2 * 64)
    weights = torch.zeros(6, 64, dtype=dtype)
    weights[3, 40] = 65536 * STEPS[format.name]
    weights[3, 41] = -1
    with pytest.raises(InputError) as error:
        format.quantize(weights, "layer.weight")
    assert str(error.value) == (
        f"layer.weight: row 3, columns 32 to 63: the {format.name} scale overflows fp16 "
        f"(weights reach {float(weights[3, 40]):g}); leave this tensor unquantized"
    )


@pytest.mark.parametrize("name", ["q4_1", "q5_1"])
def test_a_minimum_that_overflows_fp16_is_refused_too(name):
    with pytest.raises(InputError, match=f"w: row 0, columns 0 to 31: the {name} scale overflows fp16"):
        FORMATS[name].quantize(torch.full((1, 32), -65520.0), "w")


@every_format
@pytest.mark.parametrize("shape", [(32,), (2, 3, 32), (4, 40), (4, 31), (0, 32), (4, 0), ()])
def test_shapes_that_are_no_rows_of_whole_blocks_are_refused(format, shape):
    assert not format.fits(shape)
    with pytest.raises(InputError) as error:
        format.quantize(torch.zeros(shape), "layer.weight")
    assert str(error.value) == (
        f"layer.weight: shape {list(shape)} cannot be packed as {format.name}: "
        "two dimensions and rows of a multiple of 32 are needed"
    )


@every_format
def test_what_is_no_rows_of_blocks_cannot_be_decoded(format):
    message = f"{format.name} blocks must be uint8 rows of a multiple of {format.block_bytes} bytes"
    with pytest.raises(ValueError, match=message):
        format.dequantize(torch.zeros(2, format.block_bytes + 1, dtype=torch.uint8))
    with pytest.raises(ValueError, match=message):
        format.dequantize(torch.zeros(2, format.block_bytes))
