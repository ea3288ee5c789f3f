"""Fake-quantized layers compute with the bytes that are written, and pass gradients straight through."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from twin_layers import IN, OUT, every_dtype, every_format, every_layer, every_shape, inputs

from quantlab.errors import InputError
from quantlab.formats import FORMATS
from quantlab.nn import FakeQuantEmbedding, FakeQuantLinear, QuantEmbedding, QuantLinear, fake_quantize_modules
from quantlab.nn.fake_quant import enable_fake_quant, fake_quant_layers
from quantlab.nn.fake_quant_lora import FakeQuantLoraLinear
from quantlab.nn.learnable_scales import make_scales_learnable

Q4_1 = FORMATS["q4_1"]


def float_layer(kind: str = "linear", bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(3)
    layer = Conv1D(OUT, IN) if kind == "conv1d" else nn.Linear(IN, OUT, bias=bias)
    nn.init.normal_(layer.weight, std=0.1)
    if bias:
        nn.init.normal_(layer.bias)
        layer.bias.data = layer.bias.data.to(dtype)
    return layer


def rows_of(layer: nn.Module) -> torch.Tensor:
    return layer.weight.detach().T.contiguous() if isinstance(layer, Conv1D) else layer.weight.detach()


def packed_twin(layer: nn.Module, format, activations: str, dtype: torch.dtype = torch.float32) -> QuantLinear:
    twin = QuantLinear(
        IN, OUT, bias=layer.bias is not None, format=format, transposed=isinstance(layer, Conv1D),
        activations=activations, dtype=dtype,
    )  # fmt: skip
    twin.weight.data = format.quantize(rows_of(layer)).blocks
    if layer.bias is not None:
        twin.bias.data = layer.bias.data.clone()
    return twin


def fake(layer: nn.Module, format=Q4_1, **options) -> FakeQuantLinear:
    return FakeQuantLinear(layer, format, transposed=isinstance(layer, Conv1D), **options)


@every_layer
@every_shape
@every_dtype
@pytest.mark.parametrize("activations", ["float", "int8"])
def test_forward_and_input_gradient_are_those_of_the_packed_layer_bit_by_bit(kind, bias, shape, dtype, activations):
    layer = float_layer(kind, bias, dtype)
    twin, trained = packed_twin(layer, Q4_1, activations, dtype), fake(layer, activations=activations)
    x, upstream = inputs(shape, dtype), inputs((*shape[:-1], OUT), dtype)
    with torch.no_grad():
        assert torch.equal(trained(x), twin(x))
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    result, expected = trained(one), twin(other)
    assert result.dtype == dtype
    assert torch.equal(result, expected)
    result.backward(upstream)
    expected.backward(upstream)
    assert torch.equal(one.grad, other.grad)
    if bias:
        assert torch.equal(trained.bias.grad, twin.bias.grad)


@every_format
def test_every_format_and_fewer_levels(format):
    layer = float_layer()
    for chosen in (format, format.with_levels(7)):
        expected = packed_twin(layer, chosen, "float")(inputs((5, IN)))
        assert torch.equal(fake(layer, chosen)(inputs((5, IN))), expected)
        assert torch.equal(fake(layer, chosen).packed_weight().blocks, chosen.quantize(layer.weight).blocks)


@every_layer
@pytest.mark.parametrize("activations", ["float", "int8"])
def test_weight_gradients_are_those_of_a_float_layer(kind, bias, activations):
    layer = float_layer(kind, bias)
    plain = float_layer(kind, bias)
    trained = fake(layer, activations=activations)
    x, upstream = inputs((2, 7, IN)), inputs((2, 7, OUT))
    trained(x).backward(upstream)
    plain(x).backward(upstream)
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad, rtol=1e-5, atol=1e-5)
    assert layer.weight.grad.dtype == torch.float32
    if bias:
        torch.testing.assert_close(layer.bias.grad, plain.bias.grad)


@every_layer
@every_dtype
def test_switched_off_it_is_the_float_layer(kind, bias, dtype):
    layer = float_layer(kind, bias, dtype)
    trained = fake(layer)
    trained.enabled = False
    x, upstream = inputs((3, 5, IN), dtype), inputs((3, 5, OUT), dtype)
    result = trained(x)
    result.backward(upstream)
    own = layer.weight.grad
    plain = float_layer(kind, bias, dtype)
    plain.weight.data = plain.weight.data.to(dtype)
    expected = plain(x)
    expected.backward(upstream)
    assert torch.equal(result, expected)
    torch.testing.assert_close(own, plain.weight.grad.float())


@pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
def test_a_step_of_the_optimizer_is_seen(options):
    """A fused one changes weights without marking them."""
    layer = fake(float_layer())
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.05, **options)
    before = layer.packed_weight().blocks
    layer(inputs((5, IN))).square().sum().backward()
    optimizer.step()
    assert not torch.equal(layer.packed_weight().blocks, before)
    assert torch.equal(layer.packed_weight().blocks, Q4_1.quantize(layer.weight).blocks)
    with layer.held_blocks():
        held = layer.packed_weight().blocks
        assert layer.packed_weight().blocks is held
        layer.enabled = False
    with layer.held_blocks():
        assert layer._held is None
    assert layer._held is None


def test_loaded_and_moved_weights_are_seen():
    layer, other = fake(float_layer()), float_layer()
    nn.init.normal_(other.weight)
    layer.packed_weight()
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer.packed_weight().blocks, Q4_1.quantize(other.weight).blocks)
    layer.weight.data = other.weight.data * 2
    assert torch.equal(layer.packed_weight().blocks, Q4_1.quantize(2 * other.weight).blocks)


def test_a_weight_that_is_no_number_is_named():
    layer = fake(float_layer(), name="model.layers.0.x.weight")
    with torch.no_grad():
        layer.weight[3, 40] = torch.nan
    with pytest.raises(InputError, match=r"model.layers.0.x.weight: row 3, column 40"):
        layer(inputs((2, IN)))


@pytest.mark.parametrize("scale", [None, 8.0])
@every_dtype
def test_an_embedding_is_that_of_the_packed_table(scale, dtype):
    torch.manual_seed(0)
    table = nn.Embedding(20, IN, padding_idx=3)
    nn.init.normal_(table.weight)
    packed = QuantEmbedding(20, IN, format=Q4_1, padding_idx=3, scale=scale, dtype=dtype)
    packed.weight.data = Q4_1.quantize(table.weight).blocks
    trained = FakeQuantEmbedding(table, Q4_1, scale=scale, dtype=dtype)
    ids = torch.tensor([[1, 5, 5], [3, 0, 19]])
    result = trained(ids)
    assert result.dtype == dtype
    assert torch.equal(result, packed(ids))
    assert torch.equal(trained.packed_weight().blocks, packed.weight)
    result.float().sum().backward()
    counts = torch.zeros(20).index_add_(0, ids.reshape(-1), torch.ones(6))
    counts[3] = 0  # the padding
    expected = (counts * (1.0 if scale is None else scale))[:, None].expand(20, IN)
    assert torch.equal(table.weight.grad, expected)
    trained.enabled = False
    torch.testing.assert_close(trained(ids), table(ids).to(dtype) * (1.0 if scale is None else scale))


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "gpt_neox", "phi3", "gemma2", "gemma3_text"])
def test_a_model_keeps_its_names_and_ties(family, make_model, tmp_path):
    from quantlab.calibration.quantize import quantize_checkpoint
    from quantlab.checkpoint import open_checkpoint
    from quantlab.loading import load_model

    folder = make_model(tmp_path / "float", family)
    quantize_checkpoint(folder, tmp_path / "packed")
    checkpoint = open_checkpoint(tmp_path / "packed")
    model, packed = load_model(folder), load_model(tmp_path / "packed")
    names = list(model.state_dict())
    formats = {name: checkpoint.format(name) for name in checkpoint.names if checkpoint.format(name) is not None}
    swapped = fake_quantize_modules(model, formats)
    assert list(model.state_dict()) == names
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.lm_head.format is formats[checkpoint.family.embedding]
    assert {f"{name}.weight" for name in swapped} == {*formats, "lm_head.weight"}
    ids = torch.arange(5, 60)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, packed(ids).logits)
        enable_fake_quant(model, False)
        assert torch.equal(model(ids).logits, load_model(folder)(ids).logits)
    for name, layer in fake_quant_layers(model):
        if f"{name}.weight" in formats:
            assert torch.equal(layer.packed_weight().blocks, checkpoint.read_packed(f"{name}.weight").blocks)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("activations", ["float", "int8"])
def test_a_lora_is_packed_with_the_weights(kind, activations):
    layer = float_layer(kind)
    lora = FakeQuantLoraLinear(fake(layer, activations=activations), 4, 2.0)
    layer.requires_grad_(False)
    x, upstream = inputs((6, IN)), inputs((6, OUT))
    assert torch.equal(lora(x), packed_twin(layer, Q4_1, activations)(x))  # B is zero
    with torch.no_grad():
        lora.lora_B.normal_(0, 0.1)
    update = torch.zeros(OUT, IN)
    for k in range(4):  # in the stated order of sums
        update = update + lora.lora_B.detach()[:, k : k + 1] * lora.lora_A.detach()[k]
    blocks = Q4_1.quantize(rows_of(layer) + update * 2.0).blocks
    assert torch.equal(lora.packed_weight().blocks, blocks)
    lora(x).backward(upstream)
    plain_a, plain_b = (factor.detach().clone().requires_grad_() for factor in (lora.lora_A, lora.lora_B))
    (2.0 * (x @ plain_a.T) @ plain_b.T).backward(upstream)
    torch.testing.assert_close(lora.lora_A.grad, plain_a.grad, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(lora.lora_B.grad, plain_b.grad, rtol=1e-5, atol=1e-4)
    lora.enabled = False
    expected = float_layer(kind)(x) + 2.0 * (x @ lora.lora_A.T) @ lora.lora_B.T
    torch.testing.assert_close(lora(x), expected)


def test_minimums_alone_have_the_gradients_they_have_beside_d():
    layer = packed_twin(float_layer(), Q4_1, "float")
    found = {}
    for alone in (True, False):
        model = nn.Sequential(packed_twin(float_layer(), Q4_1, "float"))
        model[0].weight.data = layer.weight.data.clone()
        blocks = make_scales_learnable(model)["0.weight"]
        blocks.stretch.requires_grad_(not alone)
        model(inputs((5, IN))).square().sum().backward()
        found[alone] = blocks.shift.grad
        assert (blocks.stretch.grad is None) == alone
    assert found[True].abs().max() > 0
    assert torch.equal(found[True], found[False])
