"""Block formats on tensors: packed tensors, fake quantization and its gradients; bad input is named."""

from __future__ import annotations

import numpy as np
import pytest
import torch
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

from quantlab.errors import InputError
from quantlab.formats import FORMATS, PackedTensor, arithmetic

every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)


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


@every_device
@every_format
@every_dtype
def test_dequantize_writes_to_out(format, dtype, device):
    blocks = torch.from_numpy(gguf_blocks(gaussian(np.random.default_rng(0)), format)).to(device)
    memory = torch.full((50, 256), torch.nan, dtype=dtype, device=device)
    assert format.dequantize(blocks, dtype, out=memory[:40]).data_ptr() == memory.data_ptr()
    assert torch.equal(memory[:40], format.dequantize(blocks, dtype))
    assert memory[40:].isnan().all()


@pytest.mark.parametrize(
    "out",
    [torch.zeros(40, 255), torch.zeros(40, 256).double(), torch.zeros(256, 40).T],
    ids=["shape", "dtype", "layout"],
)
def test_dequantize_refuses_an_out_that_is_not_the_results(out):
    blocks = torch.from_numpy(gguf_blocks(gaussian(np.random.default_rng(0)), FORMATS["q4_1"]))
    with pytest.raises(ValueError, match="out has shape"):
        FORMATS["q4_1"].dequantize(blocks, out=out)


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
