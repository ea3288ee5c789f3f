"""Ternary layers in training: one scale a tensor, activations of one scale a token, gradients straight through both."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from quantlab.errors import InputError
from quantlab.formats import FORMATS, format_named
from quantlab.nn import FakeQuantEmbedding, FakeQuantLinear
from quantlab.nn.fake_quant_lora import FakeQuantLoraLinear
from quantlab.nn.int8 import int8_linear
from quantlab.nn.swap import fake_quantize_modules
from quantlab.nn.token_int8 import quantize_tokens, token_linear

TERNARY = format_named("ternary")
IN, OUT = 512, 24


def layer_of(kind: str = "linear", bias: bool = True) -> nn.Module:
    torch.manual_seed(3)
    layer = Conv1D(OUT, IN) if kind == "conv1d" else nn.Linear(IN, OUT, bias=bias)
    nn.init.normal_(layer.weight, std=0.1)
    if bias:
        nn.init.normal_(layer.bias)
    return layer


def rows_of(layer: nn.Module) -> torch.Tensor:
    return layer.weight.detach().T.contiguous() if isinstance(layer, Conv1D) else layer.weight.detach()


def fake(layer: nn.Module, activations: str = "int8") -> FakeQuantLinear:
    return FakeQuantLinear(layer, TERNARY, transposed=isinstance(layer, Conv1D), activations=activations)


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def ternary_twin(weight: torch.Tensor) -> torch.Tensor:
    """gamma * RoundClip(W / (gamma + eps), -1, 1) in fp64, as the paper writes it."""
    values = weight.double()
    gamma = values.abs().mean().to(torch.float16).double()
    return gamma * (values / (gamma + 1e-5)).round().clamp(-1, 1)


def rounded_twin(x: torch.Tensor) -> torch.Tensor:
    """Activations in 255 steps of a token's largest, in fp64."""
    step = x.double().abs().amax(dim=-1, keepdim=True) / 127
    return (x.double() / step).round() * step


def test_codes_of_tokens_by_hand():
    x = torch.tensor(
        [[127.0, -63.5, 0.5, 1.5, 0.0], [0.0] * 5, [1.0, float("inf"), 2, 3, 4], [float("nan"), 1, 2, 3, 4]]
    )
    codes, scales = quantize_tokens(x)
    assert codes.dtype == torch.int8
    assert codes.tolist() == [[127, -64, 0, 2, 0], [0] * 5, [0] * 5, [0] * 5]  # ties to even
    assert scales[:2].tolist() == [[1.0], [0.0]]
    assert scales[2:].isnan().all()
    assert quantize_tokens(torch.full((1, 2), 1e-44)).codes.tolist() == [[0, 0]]  # its inverse is beyond fp32


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_the_forward_pass_is_the_papers(kind):
    layer = layer_of(kind)
    x = inputs(2, 7, IN)
    expected = rounded_twin(x) @ ternary_twin(rows_of(layer)).T + layer.bias.double()
    torch.testing.assert_close(fake(layer)(x).double(), expected, rtol=1e-5, atol=1e-5)
    expected = x.double() @ ternary_twin(rows_of(layer)).T + layer.bias.double()
    torch.testing.assert_close(fake(layer, "float")(x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("activations", ["int8", "float"])
def test_gradients_pass_straight_through_and_see_rounded_activations(kind, activations):
    layer = layer_of(kind)
    x, upstream = inputs(2, 7, IN).requires_grad_(), inputs(2, 7, OUT)
    fake(layer, activations)(x).backward(upstream)
    seen = rounded_twin(x.detach()) if activations == "int8" else x.detach().double()
    rows = upstream.double().reshape(-1, OUT)
    expected = rows.T @ seen.reshape(-1, IN)
    found = layer.weight.grad.T if kind == "conv1d" else layer.weight.grad
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(x.grad.double(), upstream.double() @ ternary_twin(rows_of(layer)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.bias.grad.double(), rows.sum(dim=0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torch_and_the_core_differ_by_float_noise(dtype):
    x, layer = inputs(9, IN, dtype=dtype), layer_of()
    blocks = TERNARY.quantize(rows_of(layer)).blocks
    core = int8_linear(x, blocks, layer.bias, TERNARY)
    other = token_linear(x, blocks, layer.bias, TERNARY, dtype)
    assert core.dtype == other.dtype == dtype
    spread = float(core.float().abs().max())
    bound = 1e-6 if dtype == torch.float32 else 2**-7
    assert float((core.float() - other.float()).abs().max()) <= bound * spread


def test_torch_handles_blocks_of_several_scales_and_tokens_that_are_no_numbers():
    """As a file of another program may have them."""
    from quantlab.formats.parts import scales_of, with_scales

    blocks = TERNARY.quantize(inputs(OUT, IN)).blocks
    d, _ = scales_of(blocks, TERNARY)
    mixed = with_scales(blocks, TERNARY, d * torch.linspace(0.25, 2, d.numel()).reshape(d.shape), None)
    x = inputs(3, IN)
    x[1, 5] = torch.nan
    found = token_linear(x, mixed, None, TERNARY, torch.float32)
    expected = rounded_twin(x) @ TERNARY.dequantize(mixed).double().T
    torch.testing.assert_close(found[[0, 2]].double(), expected[[0, 2]], rtol=1e-5, atol=1e-4)
    assert found[1].isnan().all()
    torch.testing.assert_close(found, int8_linear(x, mixed, None, TERNARY), rtol=1e-5, atol=1e-4, equal_nan=True)
    zero = TERNARY.quantize(torch.zeros(OUT, IN)).blocks
    assert not token_linear(inputs(2, IN), zero, None, TERNARY, torch.float32).any()


@pytest.mark.parametrize("activations", ["int8", "float"])
def test_a_lora_is_rounded_with_all_weights_at_once(activations, monkeypatch):
    from quantlab.nn import fake_quant_lora

    monkeypatch.setattr(fake_quant_lora, "TILE_WEIGHTS", IN)  # a row at a time, were blocks independent
    layer = layer_of()
    lora = FakeQuantLoraLinear(fake(layer, activations), 4, 2.0)
    layer.requires_grad_(False)
    with torch.no_grad():
        lora.lora_B.normal_(0, 0.1)
    x, upstream = inputs(6, IN), inputs(6, OUT)
    update = torch.zeros(OUT, IN)
    for k in range(4):  # in the stated order of sums
        update = update + lora.lora_B.detach()[:, k : k + 1] * lora.lora_A.detach()[k]
    assert torch.equal(lora.packed_weight().blocks, TERNARY.quantize(layer.weight + update * 2.0).blocks)
    lora(x).backward(upstream)
    seen = (rounded_twin(x) if activations == "int8" else x.double()).float()
    a, b = (factor.detach().clone().requires_grad_() for factor in (lora.lora_A, lora.lora_B))
    (2.0 * (seen @ a.T) @ b.T).backward(upstream)
    torch.testing.assert_close(lora.lora_A.grad, a.grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(lora.lora_B.grad, b.grad, rtol=1e-4, atol=1e-3)


def test_an_embedding_has_the_scale_of_its_whole_table():
    torch.manual_seed(0)
    table = nn.Embedding(20, IN, padding_idx=3)
    nn.init.normal_(table.weight)
    with torch.no_grad():
        table.weight[7] *= 5  # of this row alone the scale would be another
    trained = FakeQuantEmbedding(table, TERNARY)
    ids = torch.tensor([[7, 5, 5], [3, 0, 19]])
    result = trained(ids)
    assert torch.equal(result, TERNARY.quantize(table.weight).dequantize()[ids])
    result.sum().backward()
    counts = torch.zeros(20).index_add_(0, ids.reshape(-1), torch.ones(6))
    counts[3] = 0  # the padding
    assert torch.equal(table.weight.grad, counts[:, None].expand(20, IN))


def test_automatic_activations(make_model, tmp_path):
    from quantlab.loading import load_model

    model = load_model(make_model(tmp_path / "model", "llama", hidden_size=256, intermediate_size=256))
    formats = {"model.layers.0.mlp.up_proj.weight": TERNARY, "model.layers.0.mlp.down_proj.weight": FORMATS["q4_1"]}
    names = fake_quantize_modules(model, formats, activations="auto")
    assert [model.get_submodule(name).activations for name in names] == ["int8", "int8"]  # on a CPU


def test_a_wrong_weight_is_named():
    layer = fake(layer_of())
    with torch.no_grad():
        layer.weight[3, 40] = np.nan
    with pytest.raises(InputError, match="row 3, column 40"):
        layer(inputs(2, IN))
