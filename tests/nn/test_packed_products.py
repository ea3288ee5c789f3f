"""Products in tiles: those of the dense layer up to the last bits, and never all of the weight in float."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from twin_layers import IN, OUT, every_format, every_layer, every_shape, gradients, inputs, twins

from quantlab.formats import FORMATS, BlockFormat
from quantlab.nn import QuantLinear, packed_products, set_activations
from quantlab.nn.packed_products import packed_linear, tiled_input_gradient, tiled_linear

TILE_ROWS = 16  # the fewest that a tile has


@pytest.fixture
def small_tiles(monkeypatch):
    """Four tiles for the layers of `twins`."""
    monkeypatch.setattr(packed_products, "_CPU_TILE", TILE_ROWS * IN)


@pytest.fixture
def rows_in_float(monkeypatch) -> list[int]:
    """How many rows each call of `dequantize` has."""
    rows: list[int] = []
    original = BlockFormat.dequantize

    def counted(self, blocks, dtype=None, out=None):
        rows.append(len(blocks))
        return original(self, blocks, dtype, out)

    monkeypatch.setattr(BlockFormat, "dequantize", counted)
    return rows


def assert_near(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Relative to the size of the whole."""
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    difference = (found.double() - expected.double()).norm()
    assert difference <= tolerance * expected.double().norm()


@pytest.mark.usefixtures("small_tiles")
@every_layer
@every_format
@every_shape
def test_training_computes_what_the_dense_layer_does(kind, bias, format, shape):
    quantized, plain = twins(kind, bias, format=format)
    x, upstream = inputs(shape), inputs((*shape[:-1], OUT))
    assert_near(quantized(x.requires_grad_()), plain(x))
    found, expected = gradients(quantized, x.detach(), upstream), gradients(plain, x.detach(), upstream)
    assert_near(found[0], expected[0])
    if bias:
        assert torch.equal(found[1], expected[1])


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_training_in_other_dtypes(dtype, bias):
    """No further from the layer in double precision than the dense layer of that dtype is, give or take."""
    quantized, plain = twins("linear", bias, dtype)
    exact = copy.deepcopy(plain).double()
    x, upstream = inputs((2, 7, IN), dtype), inputs((2, 7, OUT), dtype)
    tolerance = 2 * torch.finfo(dtype).eps
    assert_near(quantized(x.requires_grad_()), exact(x.double()).to(dtype), tolerance)
    expected = gradients(exact, x.detach().double(), upstream.double())[0].to(dtype)
    assert_near(gradients(quantized, x.detach(), upstream)[0], expected, tolerance)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("backward_inside", [False, True])
def test_training_under_autocast(bias, backward_inside):
    quantized, plain = twins("linear", bias)
    results = []
    for layer in (quantized, plain):
        x = inputs((2, 7, IN)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            result = layer(x)
            if backward_inside:
                result.backward(inputs((2, 7, OUT)).to(result.dtype))
        if not backward_inside:
            result.backward(inputs((2, 7, OUT)).to(result.dtype))
        results.append((result, x.grad))
    for found, expected in zip(*results, strict=True):
        assert_near(found, expected, 2**-7)
    assert results[0][0].dtype == torch.bfloat16
    assert results[0][1].dtype == torch.float32


@pytest.mark.usefixtures("small_tiles")
def test_many_bf16_tiles_are_added_in_fp32():
    """Each tile adds 1 to 256, where bf16 numbers are 2 apart: added one by one in bf16 they would all be lost."""
    format = FORMATS["q4_0"]
    weight = torch.zeros(17 * TILE_ROWS, IN)
    weight[0] = 256
    weight[TILE_ROWS::TILE_ROWS] = 1
    packed = format.quantize(weight)
    assert torch.equal(packed.dequantize(), weight)
    gradient = torch.ones(3, len(weight), dtype=torch.bfloat16)
    found = tiled_input_gradient(gradient, packed.blocks, format)
    assert found.dtype == torch.bfloat16
    assert (found == 256 + 16).all()


@pytest.mark.usefixtures("small_tiles")
def test_int8_activations_train_in_tiles_too():
    quantized, plain = twins()
    set_activations(quantized, "int8")
    x, upstream = inputs((2, 7, IN)), inputs((2, 7, OUT))
    with torch.no_grad():
        expected = quantized(x)
    assert torch.equal(quantized(x.clone().requires_grad_()), expected)
    found, dense = gradients(quantized, x, upstream), gradients(plain, x, upstream)
    assert_near(found[0], dense[0])
    assert torch.equal(found[1], dense[1])


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_without_gradients_the_bits_are_the_dense_layers(kind):
    quantized, plain = twins(kind)
    x = inputs((2, 7, IN))
    with torch.no_grad():
        assert torch.equal(quantized(x), plain(x))
    quantized.requires_grad_(False)
    assert torch.equal(quantized(x), plain(x))


@pytest.mark.usefixtures("small_tiles")
def test_a_transposed_layer_keeps_its_bits_in_training():
    quantized, plain = twins("conv1d")
    x = inputs((2, 7, IN)).requires_grad_()
    assert torch.equal(quantized(x), plain(x))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("activations", ["float", "int8"])
def test_training_has_no_more_than_a_tile_in_float(activations, rows_in_float):
    quantized, _ = twins()
    set_activations(quantized, activations)
    rows_in_float.clear()
    result = quantized(inputs((5, IN)).requires_grad_())
    forward = len(rows_in_float)
    result.sum().backward()
    assert rows_in_float == [TILE_ROWS] * (4 if activations == "int8" else 8)
    assert forward == (0 if activations == "int8" else 4)


def test_tiles_of_a_large_layer_take_four_megabytes(rows_in_float):
    format, columns = FORMATS["q4_0"], 2048
    blocks = torch.zeros(1200, format.row_bytes(columns), dtype=torch.uint8)
    layer = QuantLinear(columns, len(blocks), bias=False, format=format)
    layer.weight.data = blocks
    layer(torch.ones(1, columns, requires_grad=True)).sum().backward()
    assert rows_in_float == [512, 512, 176] * 2
    assert max(rows_in_float) * columns * 4 == 4 << 20


@given(rows=st.integers(1, 100), blocks=st.integers(1, 3), leading=st.lists(st.integers(0, 3), max_size=2))
@settings(deadline=None, max_examples=60)
def test_any_shape(rows, blocks, leading):
    generator = torch.Generator().manual_seed(rows)
    packed = FORMATS["q5_1"].quantize(torch.randn(rows, 32 * blocks, generator=generator))
    x, gradient = (torch.randn(*leading, size, generator=generator) for size in (32 * blocks, rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_products, "_CPU_TILE", 1024)
        result = tiled_linear(x, packed.blocks, None, packed.format)
        input_gradient = tiled_input_gradient(gradient, packed.blocks, packed.format)
    assert_near(result, packed_linear(x, packed.blocks, None, packed.format, transposed=False))
    assert_near(input_gradient, gradient @ packed.dequantize())


@pytest.mark.usefixtures("small_tiles")
def test_strided_gradients_count_by_value():
    quantized, plain = twins()
    for layer in (quantized, plain):
        layer.x = inputs((5, IN)).requires_grad_()
        layer(layer.x).sum().backward()  # one number, expanded
    assert_near(quantized.x.grad, plain.x.grad)


@pytest.mark.usefixtures("small_tiles")
def test_a_chain_of_layers_trains():
    """Gradients reach the first layer of several through tiles, as they do in a dense model."""
    quantized, plain = nn.Sequential(), nn.Sequential()
    for _ in range(2):
        packed, dense = twins()
        quantized.extend([packed, nn.GELU(), nn.Linear(OUT, IN, bias=False)])
        plain.extend([dense, nn.GELU(), copy.deepcopy(quantized[-1])])
    results = []
    for model in (quantized, plain):
        x = inputs((3, IN)).requires_grad_()
        model(x).square().sum().backward()
        results.append(
            [x.grad, *(layer.weight.grad for layer in model if type(layer) is nn.Linear and layer.bias is None)]
        )
    for found, expected in zip(*results, strict=True):
        assert_near(found, expected)
