"""QuantLinear with int8 activations: the engine's product to the last bit, gradients as in float."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from twin_layers import (
    GRAD_MODES,
    IN,
    OUT,
    every_dtype,
    every_format,
    every_layer,
    every_shape,
    gradients,
    inputs,
    twins,
)

from quantlab.errors import InputError
from quantlab.formats import FORMATS
from quantlab.native import _core
from quantlab.nn import QuantLinear, set_activations

# int8 activations.


def in_int8(*arguments, **keywords) -> tuple[QuantLinear, nn.Module]:
    """`twins`, the packed one with int8 activations."""
    quantized, plain = twins(*arguments, **keywords)
    assert set_activations(quantized, "int8") == [""]
    return quantized, plain


def rounded(x: torch.Tensor) -> torch.Tensor:
    """The activations that int8 stands for, float64: whole multiples of each run's largest magnitude / 127."""
    runs = x.float().reshape(*x.shape[:-1], x.shape[-1] // 32, 32)
    scales = runs.abs().amax(dim=-1, keepdim=True) / 127
    return ((runs * (1 / scales)).round().double() * scales.double()).nan_to_num().reshape(x.shape)


def double(layer: nn.Module) -> nn.Module:
    return copy.deepcopy(layer).to(torch.float64)


def engine_product(quantized: QuantLinear, x: torch.Tensor) -> torch.Tensor:
    """What the native engine computes for fp32 [tokens, in], from a copy of the weights of its own."""
    tokens, columns = x.shape
    codes, scales, sums = torch.empty(tokens, columns, dtype=torch.int8), *torch.empty(2, tokens, columns // 32)
    activations = (codes.numpy(), scales.numpy(), sums.numpy())
    _core.quantize_tokens(x.contiguous().numpy(), *activations)
    matrix = _core.PackedMatrix(quantized.format.name, quantized.out_features, columns)
    matrix.fill(0, quantized.weight.numpy())
    out = torch.empty(tokens, quantized.out_features)
    matrix.multiply_codes(_core.ThreadPool(1), *activations, out.numpy(), 0, matrix.groups)
    return out


@every_layer
@every_format
@every_shape
def test_int8_multiplies_the_rounded_activations(kind, bias, format, shape):
    quantized, plain = in_int8(kind, bias, format=format)
    x = inputs(shape)
    result, expected = quantized(x), double(plain)(rounded(x))
    assert result.shape == expected.shape
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)
    if x.numel() > 0:
        assert not torch.allclose(result, plain(x), rtol=0, atol=1e-4)


@every_layer
@pytest.mark.parametrize("mode", GRAD_MODES)
def test_int8_is_the_engines_product_to_the_last_bit_and_the_bias(kind, bias, mode):
    quantized, _ = in_int8(kind, bias)
    context, trained = GRAD_MODES[mode]
    x = inputs((2, 7, IN))
    expected = engine_product(quantized, x.reshape(-1, IN)).reshape(2, 7, OUT)
    if bias:
        expected += quantized.bias.detach()
    with context():
        assert torch.equal(quantized(x.clone().requires_grad_(trained)), expected)


@given(
    leading=st.lists(st.integers(0, 4), max_size=3),
    blocks=st.integers(1, 4),
    rows=st.integers(1, 40),
    format=st.sampled_from(sorted(name for name, row in FORMATS.items() if row.activations == "block")),
    seed=st.integers(0, 2**16),
)
@settings(deadline=None, max_examples=40)
def test_int8_takes_any_shape(leading, blocks, rows, format, seed):
    generator = torch.Generator().manual_seed(seed)
    packed = FORMATS[format].quantize(torch.randn(rows, 32 * blocks, generator=generator))
    layer = QuantLinear(32 * blocks, rows, bias=False, format=packed.format, activations="int8")
    layer.weight.data = packed.blocks
    x = torch.randn(*leading, 32 * blocks, generator=generator)
    result = layer(x)
    assert result.shape == (*leading, rows)
    assert torch.equal(result.reshape(-1, rows), engine_product(layer, x.reshape(-1, 32 * blocks)))


@every_dtype
def test_int8_goes_by_way_of_fp32_and_back(dtype):
    """The bias too is added before the one rounding to the dtype."""
    quantized, _ = in_int8(dtype=dtype)
    x = inputs((5, IN), dtype)
    result = quantized(x)
    assert result.dtype == dtype
    wide = copy.deepcopy(quantized).float()
    assert torch.equal(result, wide(x.float()).to(dtype))


def test_int8_counts_strided_inputs_by_value():
    quantized, _ = in_int8()
    x = inputs((IN, 7)).T
    assert torch.equal(quantized(x), quantized(x.contiguous()))
    assert torch.equal(quantized(x[3]), quantized(x.contiguous()[3]))


@every_layer
def test_int8_passes_gradients_as_float_activations_do(kind, bias):
    quantized, _ = in_int8(kind, bias)
    reference, _ = twins(kind, bias)
    x, upstream = inputs((2, 7, IN)), inputs((2, 7, OUT))
    for found, expected in zip(gradients(quantized, x, upstream), gradients(reference, x, upstream), strict=True):
        assert found is expected is None or torch.equal(found, expected)


def test_int8_under_autocast_returns_its_dtype():
    quantized, _ = in_int8()
    x = inputs((5, IN))
    with torch.autocast("cpu", torch.bfloat16):
        result = quantized(x)
    assert torch.equal(result, quantized(x).to(torch.bfloat16))


def test_int8_keeps_nothing_but_the_packed_bytes():
    """After a call as before it: no other tensor anywhere in the module, the very same memory."""
    quantized, _ = in_int8(bias=False)
    address = quantized.weight.data_ptr()
    quantized(inputs((5, IN)))
    held = [value for value in vars(quantized).values() if isinstance(value, torch.Tensor)]
    assert held == []
    assert list(quantized.state_dict()) == ["weight"]
    assert quantized.weight.data_ptr() == address
    assert quantized.weight.untyped_storage().nbytes() == OUT * quantized.format.row_bytes(IN)


def test_int8_follows_the_weight():
    """Nothing is prepared in advance: new blocks count from the next call on."""
    quantized, _ = in_int8()
    x = inputs((5, IN))
    quantized(x)
    quantized.weight.data.zero_()
    assert torch.equal(quantized(x), quantized.bias.detach().expand(5, OUT))


def test_int8_is_a_choice_for_the_moment():
    quantized, plain = in_int8()
    assert repr(quantized).endswith("format=q4_1, activations=int8)")
    assert set(quantized.state_dict()) == {"weight", "bias"}
    set_activations(nn.Sequential(quantized), "float")
    assert torch.equal(quantized(inputs((5, IN))), plain(inputs((5, IN))))


def test_int8_refuses_what_it_cannot_compute():
    quantized, _ = in_int8()
    with pytest.raises(ValueError, match="on the CPU only, and the input is on meta"):
        quantized(torch.empty(5, IN, device="meta"))
    with pytest.raises(ValueError, match=r"input has shape \[5, 64\]; expected \[\.\.\., 96\]"):
        quantized(inputs((5, 64)))
    with pytest.raises(ValueError, match=r"floating point, not torch\.int64"):
        quantized(torch.ones(5, IN, dtype=torch.int64))
    with pytest.raises(ValueError, match="and the weight is on meta"):
        quantized.to("meta")(inputs((5, IN)))


def test_other_words_for_activations_are_refused():
    with pytest.raises(InputError, match="activations 'int4': choose one of: float, int8"):
        QuantLinear(IN, OUT, bias=False, format=FORMATS["q4_1"], activations="int4")
    with pytest.raises(InputError, match="activations 'int4'"):
        set_activations(nn.Sequential(twins()[0]), "int4")
