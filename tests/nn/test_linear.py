"""QuantLinear computes what nn.Linear (or Conv1D) does with the dequantized weight, and keeps only blocks."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers.pytorch_utils import Conv1D

from quantlab.errors import InputError
from quantlab.formats import FORMATS
from quantlab.native import _core
from quantlab.nn import QuantLinear, set_activations

IN, OUT = 96, 64
FLOAT = torch.float32

every_format = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
every_layer = pytest.mark.parametrize(
    ("kind", "bias"), [("linear", True), ("linear", False), ("conv1d", True)], ids=["linear", "no bias", "conv1d"]
)
every_shape = pytest.mark.parametrize("shape", [(5, IN), (2, 7, IN), (2, 3, 4, IN), (1, 1, IN), (0, IN)], ids=str)


def twins(kind: str = "linear", bias: bool = True, dtype: torch.dtype = FLOAT, format=FORMATS["q4_1"]):
    """A packed layer and the float layer with its dequantized weight."""
    torch.manual_seed(0)
    packed = format.quantize(torch.randn(OUT, IN) * 0.1)
    weight, offset = packed.dequantize(dtype), torch.randn(OUT).to(dtype)
    quantized = QuantLinear(IN, OUT, bias=bias, format=format, transposed=kind == "conv1d", dtype=dtype)
    quantized.weight.data = packed.blocks
    if kind == "conv1d":
        plain = Conv1D(OUT, IN).to(dtype)
        plain.weight.data = weight.T.contiguous()
    else:
        plain = nn.Linear(IN, OUT, bias=bias, dtype=dtype)
        plain.weight.data = weight
    if bias:
        quantized.bias.data, plain.bias.data = offset.clone(), offset.clone()
    return quantized, plain


def inputs(shape, dtype: torch.dtype = FLOAT) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


GRAD_MODES = {
    "no_grad": (torch.no_grad, False),
    "inference_mode": (torch.inference_mode, False),
    "frozen input": (contextlib.nullcontext, False),
    "trained input": (contextlib.nullcontext, True),
}


@every_layer
@every_dtype
@every_shape
@pytest.mark.parametrize("mode", GRAD_MODES)
def test_forward_is_that_of_the_dequantized_layer_to_the_last_bit(kind, bias, dtype, shape, mode):
    quantized, plain = twins(kind, bias, dtype)
    context, trained = GRAD_MODES[mode]
    x = inputs(shape, dtype).requires_grad_(trained)
    with context():
        result, expected = quantized(x), plain(x)
    assert result.dtype == dtype
    assert torch.equal(result, expected)


@every_layer
@every_format
def test_every_format_computes_alike(kind, bias, format):
    quantized, plain = twins(kind, bias, format=format)
    assert torch.equal(quantized(inputs((5, IN))), plain(inputs((5, IN))))


def test_strided_inputs_count_by_value():
    quantized, plain = twins()
    x = inputs((IN, 7)).T
    assert torch.equal(quantized(x), plain(x))
    assert torch.equal(quantized(x[3]), plain(x[3]))


def gradients(layer: nn.Module, x: torch.Tensor, upstream: torch.Tensor, autocast: bool = False):
    """The gradients of the input and, where there is one, of the bias."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        result = layer(x)
    result.backward(upstream.to(result.dtype))
    return x.grad, None if layer.bias is None else layer.bias.grad


@pytest.mark.parametrize("bias", [True, False])
@every_dtype
@every_shape
def test_gradients_are_those_of_the_dequantized_linear_layer_to_the_last_bit(bias, dtype, shape):
    quantized, plain = twins("linear", bias, dtype)
    x, upstream = inputs(shape, dtype), inputs((*shape[:-1], OUT), dtype)
    input_gradient, bias_gradient = gradients(quantized, x, upstream)
    expected_input, expected_bias = gradients(plain, x, upstream)
    assert torch.equal(input_gradient, expected_input)
    if bias:
        assert torch.equal(bias_gradient, expected_bias)


@every_dtype
@every_shape
def test_gradients_are_those_of_the_dequantized_conv1d(dtype, shape):
    """Up to rounding: transformers multiplies by a transposed view, in another order of sums."""
    quantized, plain = twins("conv1d", True, dtype)
    x, upstream = inputs(shape, dtype), inputs((*shape[:-1], OUT), dtype)
    input_gradient, bias_gradient = gradients(quantized, x, upstream)
    expected_input, expected_bias = gradients(plain, x, upstream)
    torch.testing.assert_close(input_gradient, expected_input)
    assert torch.equal(bias_gradient, expected_bias)


def test_the_input_gradient_is_upstream_times_the_weight():
    """By hand: one output's gradient is its row of W."""
    quantized, _ = twins()
    x = inputs((1, IN)).requires_grad_()
    quantized(x)[0, 5].backward()
    assert torch.equal(x.grad[0], quantized.packed_weight().dequantize()[5])


def test_a_frozen_bias_has_no_gradient():
    quantized, plain = twins()
    quantized.bias.requires_grad_(False)
    x = inputs((5, IN)).requires_grad_()
    quantized(x).sum().backward()
    assert quantized.bias.grad is None
    assert torch.equal(x.grad, gradients(plain, inputs((5, IN)), torch.ones(5, OUT))[0])


def test_a_bias_trains_behind_a_frozen_input():
    quantized, _ = twins()
    quantized(inputs((5, IN))).sum().backward()
    assert torch.equal(quantized.bias.grad, torch.full((OUT,), 5.0))


def test_a_frozen_layer_adds_nothing_to_the_graph():
    quantized, _ = twins()
    quantized.bias.requires_grad_(False)
    assert not quantized(inputs((5, IN))).requires_grad


@every_layer
def test_no_float_weight_waits_for_the_backward_pass(kind, bias):
    """Saved between forward and backward: the blocks (a float layer saves its weight, which shows the test works)."""

    def saved_weights(layer: nn.Module) -> list[torch.Tensor]:
        saved: list[torch.Tensor] = []
        with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
            result = layer(inputs((5, IN)).requires_grad_())
        kept = getattr(result.grad_fn, "__dict__", {}).values()  # attributes of the autograd context
        saved += [value for value in kept if isinstance(value, torch.Tensor)]
        return [tensor for tensor in saved if tensor.numel() >= IN * OUT and tensor.is_floating_point()]

    quantized, plain = twins(kind, bias)
    assert len(saved_weights(plain)) == 1
    assert saved_weights(quantized) == []


@every_layer
@pytest.mark.parametrize("shape", [(5, IN), (2, 7, IN)], ids=str)
def test_autocast_computes_what_it_computes_for_the_dequantized_layer(kind, bias, shape):
    """fp32 parameters and inputs, bf16 arithmetic and outputs, fp32 gradients."""
    quantized, plain = twins(kind, bias)
    x, upstream = inputs(shape), inputs((*shape[:-1], OUT))
    with torch.autocast("cpu", torch.bfloat16):
        result, expected = quantized(x), plain(x)
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, expected)
    input_gradient, bias_gradient = gradients(quantized, x, upstream, autocast=True)
    expected_input, expected_bias = gradients(plain, x, upstream, autocast=True)
    assert input_gradient.dtype == FLOAT
    if kind == "linear":
        assert torch.equal(input_gradient, expected_input)
    else:  # bf16 sums in another order
        torch.testing.assert_close(input_gradient, expected_input, rtol=1e-2, atol=1e-3)
    if bias:
        assert bias_gradient.dtype == FLOAT
        assert torch.equal(bias_gradient, expected_bias)


# A module like any other.


def test_the_weight_is_bytes_without_gradient():
    quantized, _ = twins(format=FORMATS["q5_0"])
    assert isinstance(quantized.weight, nn.Parameter)
    assert (quantized.weight.dtype, quantized.weight.shape) == (torch.uint8, (OUT, IN // 32 * 22))
    assert not quantized.weight.requires_grad
    assert [name for name, _ in quantized.named_parameters()] == ["weight", "bias"]
    assert not list(quantized.buffers())


@every_layer
@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip(kind, bias, assign):
    quantized, plain = twins(kind, bias)
    state = quantized.state_dict()
    assert set(state) == set(plain.state_dict())
    fresh = QuantLinear(IN, OUT, bias=bias, format=quantized.format, transposed=kind == "conv1d")
    x = inputs((5, IN))
    assert not torch.equal(fresh(x), quantized(x))
    fresh.load_state_dict(state, assign=assign)
    assert torch.equal(fresh(x), quantized(x))
    assert torch.equal(fresh.weight, quantized.weight)


def test_a_copy_is_independent():
    quantized, _ = twins()
    twin = copy.deepcopy(quantized)
    before = quantized(inputs((5, IN)))
    twin.weight.data.zero_()
    assert torch.equal(quantized(inputs((5, IN))), before)
    assert twin.format == quantized.format


@every_layer
@every_dtype
def test_changing_the_dtype_changes_the_bias_and_keeps_the_blocks(kind, bias, dtype):
    quantized, plain = twins(kind, bias)
    blocks = quantized.weight.clone()
    quantized.to(dtype)
    assert torch.equal(quantized.weight, blocks)
    assert torch.equal(quantized(inputs((5, IN), dtype)), plain.to(dtype)(inputs((5, IN), dtype)))


def test_packed_weight_shares_the_modules_blocks():
    quantized, plain = twins()
    packed = quantized.packed_weight()
    assert packed.blocks.data_ptr() == quantized.weight.data_ptr()
    assert packed.shape == (OUT, IN)
    assert torch.equal(packed.dequantize(), plain.weight)


def test_it_is_a_linear_layer_that_shows_its_format():
    quantized, _ = twins()
    assert isinstance(quantized, nn.Linear)
    assert repr(quantized) == "QuantLinear(in_features=96, out_features=64, bias=True, format=q4_1)"


def test_resetting_parameters_keeps_the_blocks():
    """Blocks come from a checkpoint; libraries call this on modules that they rebuild."""
    quantized, _ = twins()
    blocks = quantized.weight.clone()
    quantized.reset_parameters()
    assert torch.equal(quantized.weight, blocks)


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
    format=st.sampled_from(sorted(FORMATS)),
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
