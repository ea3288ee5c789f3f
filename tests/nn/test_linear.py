"""QuantLinear computes what nn.Linear (or Conv1D) does with the dequantized weight, and keeps only blocks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from twin_layers import (
    FLOAT,
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

from quantlab.formats import FORMATS
from quantlab.nn import QuantLinear


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
