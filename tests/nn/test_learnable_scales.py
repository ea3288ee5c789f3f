"""Trained scales: gradients are autograd's on dequantized weights, and a forward pass is that of the written bytes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

from quantlab import load_model, quantize_checkpoint
from quantlab.formats import FORMATS
from quantlab.formats.parts import codes_of, scales_of, with_codes
from quantlab.nn import QuantEmbedding, QuantLinear
from quantlab.nn.learnable_scales import (
    LearnableBlocks,
    LearnableEmbedding,
    LearnableLinear,
    RoundedSteps,
    make_norms_learnable,
    make_scales_learnable,
)

ROWS, COLUMNS = 48, 96

OWN_SCALES = {name: row for name, row in FORMATS.items() if row.scale_of == "block"}
every_format = pytest.mark.parametrize("format", OWN_SCALES.values(), ids=OWN_SCALES)
coarse_formats = pytest.mark.parametrize("format", [f for f in OWN_SCALES.values() if f.code_bits < 8], ids=str)
either_order = pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def some_linear(format, transposed: bool = False) -> QuantLinear:
    original = draw(ROWS, COLUMNS) * 0.1 + 0.02
    layer = QuantLinear(COLUMNS, ROWS, bias=True, format=format, transposed=transposed)
    layer.weight.data = format.quantize(original).blocks
    layer.bias.data = draw(ROWS, seed=1)
    return layer


def some_embedding(format) -> QuantEmbedding:
    table = QuantEmbedding(ROWS, COLUMNS, format=format)
    table.weight.data = format.quantize(draw(ROWS, COLUMNS)).blocks
    return table


def move(blocks: LearnableBlocks, amount: float = 0.2) -> None:
    """Steps away from the start, as training makes them."""
    for seed, parameter in enumerate(blocks.parameters()):
        if parameter.requires_grad:
            parameter.data += amount * draw(*parameter.shape, seed=seed + 7).to(parameter.dtype)
    blocks.keep_codes_in_range()


def by_block(scales: torch.Tensor) -> torch.Tensor:
    return scales.repeat_interleave(32, dim=1)


@every_format
@either_order
def test_the_start_computes_what_the_packed_layer_does(format, transposed):
    layer = some_linear(format, transposed)
    x = draw(3, 5, COLUMNS, seed=2)
    for train_codes in (False, True):
        learnable = LearnableLinear(layer, LearnableBlocks(layer.packed_weight(), train_codes))
        assert torch.equal(learnable(x), layer(x))
        assert torch.equal(learnable.packed_weight().blocks, layer.weight)


@every_format
@either_order
def test_a_forward_pass_is_that_of_the_bytes_that_will_be_written(format, transposed):
    layer = some_linear(format, transposed)
    x = draw(3, 5, COLUMNS, seed=2)
    for train_codes in (False, True):
        blocks = LearnableBlocks(layer.packed_weight(), train_codes)
        move(blocks)
        learnable = LearnableLinear(layer, blocks)
        result = learnable(x)
        written = some_linear(format, transposed)
        written.weight.data = learnable.packed_weight().blocks
        assert not torch.equal(written.weight, layer.weight)
        assert torch.equal(result, written(x))
    table = some_embedding(format)
    blocks = LearnableBlocks(table.packed_weight())
    move(blocks)
    ids = torch.tensor([[0, 5, 5], [47, 1, 0]])
    rows = LearnableEmbedding(table, blocks)(ids)
    table.weight.data = blocks.packed().blocks
    assert torch.equal(rows, table(ids))


@every_format
@either_order
def test_gradients_are_those_of_the_dequantized_weights(format, transposed):
    """In fp64, where d * code + m of fp16 scales is exact in fp32 and hence the same in both."""
    layer = some_linear(format, transposed)
    layer.bias.data = layer.bias.double()
    blocks = LearnableBlocks(layer.packed_weight()).double()
    move(blocks)
    x = draw(3, 5, COLUMNS, seed=2).double().requires_grad_()
    upstream = draw(3, 5, ROWS, seed=3).double()
    LearnableLinear(layer, blocks)(x).backward(upstream)

    packed = blocks.packed()
    d, m = ((scale.double() if scale is not None else None) for scale in scales_of(packed.blocks, format))
    d.requires_grad_()
    weight = by_block(d) * codes_of(packed.blocks, format).double()
    if m is not None:
        weight = weight + by_block(m.requires_grad_())
    twin, bias = x.detach().clone().requires_grad_(), layer.bias.detach().clone().requires_grad_()
    F.linear(twin, weight, bias).backward(upstream)

    assert torch.allclose(x.grad, twin.grad, rtol=1e-12, atol=1e-12)
    assert torch.allclose(layer.bias.grad, bias.grad, rtol=1e-12, atol=1e-12)
    # From (d, m) to the steps: d = d0 + unit * stretch / spread, m = m0 + unit * shift - mean * (d - d0).
    towards_d = d.grad - (blocks.mean * m.grad if m is not None else 0)
    assert torch.allclose(blocks.stretch.grad, towards_d * blocks.unit / blocks.spread, rtol=1e-12, atol=1e-13)
    if m is not None:
        assert torch.allclose(blocks.shift.grad, m.grad * blocks.unit, rtol=1e-12, atol=1e-13)


@coarse_formats
def test_latent_codes_take_the_weights_gradient_straight_through(format):
    layer = some_linear(format)
    layer.bias.data = layer.bias.double()
    blocks = LearnableBlocks(layer.packed_weight(), train_codes=True).double()
    move(blocks, 0.6)
    x = draw(5, COLUMNS, seed=2).double()
    upstream = draw(5, ROWS, seed=3).double()
    LearnableLinear(layer, blocks)(x).backward(upstream)
    packed = blocks.packed()
    assert not torch.equal(codes_of(packed.blocks, format), codes_of(layer.weight, format))
    weight_gradient = upstream.T @ x
    expected = weight_gradient * by_block(scales_of(packed.blocks, format)[0].double())
    assert torch.allclose(blocks.latent.grad, expected, rtol=1e-12, atol=1e-13)


@every_format
def test_an_embeddings_gradients_are_those_of_its_dequantized_table(format):
    table = some_embedding(format)
    table.to(torch.float64)
    blocks = LearnableBlocks(table.packed_weight()).double()
    move(blocks)
    ids = torch.tensor([[0, 5, 5], [47, 1, 0]])
    upstream = draw(2, 3, COLUMNS, seed=3).double()
    LearnableEmbedding(table, blocks)(ids).backward(upstream)
    whole = torch.zeros(ROWS, COLUMNS, dtype=torch.float64).index_add_(0, ids.reshape(-1), upstream.reshape(6, -1))
    sums = (whole * codes_of(blocks.packed().blocks, format).double()).view(ROWS, -1, 32).sum(dim=2)
    plain = whole.view(ROWS, -1, 32).sum(dim=2) if format.has_minimum else torch.zeros_like(sums)
    expected = (sums - blocks.mean * plain) * blocks.unit / blocks.spread
    assert torch.allclose(blocks.stretch.grad, expected, rtol=1e-12, atol=1e-12)
    if format.has_minimum:
        assert torch.allclose(blocks.shift.grad, plain * blocks.unit, rtol=1e-12, atol=1e-12)


def test_a_step_moves_the_weights_by_that_share_of_d():
    """The two directions of a block have unit length and are at right angles, whatever its codes are."""
    format = FORMATS["q4_1"]
    packed = format.quantize(draw(ROWS, COLUMNS))
    codes = codes_of(packed.blocks, format).view(-1, 32)
    moves = {}
    for name in ("stretch", "shift"):
        blocks = LearnableBlocks(packed).double()
        getattr(blocks, name).data += 1.0
        d, m = blocks.scales()
        d0, m0 = (scale.double() for scale in scales_of(packed.blocks, format))
        moves[name] = ((d - d0).view(-1, 1) * codes + (m - m0).view(-1, 1)) / d0.view(-1, 1)
    for name in moves:
        assert torch.allclose(moves[name].square().mean(dim=1), torch.ones(len(codes), dtype=torch.float64))
    assert torch.allclose((moves["stretch"] * moves["shift"]).mean(dim=1), torch.zeros(len(codes)).double(), atol=1e-6)


@coarse_formats
def test_latent_codes_begin_at_the_codes_and_stay_in_range(format):
    packed = format.quantize(draw(ROWS, COLUMNS))
    blocks = LearnableBlocks(packed, train_codes=True)
    codes = codes_of(packed.blocks, format)
    assert torch.equal(blocks.latent, codes)
    blocks.latent.data += 100.0
    blocks.keep_codes_in_range()
    assert codes_of(blocks.packed().blocks, format).unique().tolist() == [float(codes.max())]
    blocks.latent.data -= 1.1
    assert codes_of(blocks.packed().blocks, format).unique().tolist() == [float(codes.max()) - 1]


@coarse_formats
def test_codes_that_are_off_are_trained_back(format):
    layer = some_linear(format)
    right = codes_of(layer.weight, format)
    x = draw(400, COLUMNS, seed=5)
    wanted = layer(x).detach()
    off = torch.rand(right.shape, generator=torch.Generator().manual_seed(0)) < 0.05
    wrong = torch.where(off, right - 3 * right.sub(right.mean()).sign(), right)
    layer.weight.data = with_codes(layer.weight, format, wrong)
    blocks = LearnableBlocks(layer.packed_weight(), train_codes=True)
    learnable = LearnableLinear(layer, blocks)
    optimizer = torch.optim.Adam([blocks.latent], lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        (learnable(x) - wanted).square().mean().backward()
        optimizer.step()
        blocks.keep_codes_in_range()
    assert (codes_of(blocks.packed().blocks, format) == right).float().mean() > 0.99


def test_no_float_weight_is_kept_for_the_backward_pass():
    layer = some_linear(FORMATS["q4_1"])
    learnable = LearnableLinear(layer, LearnableBlocks(layer.packed_weight()))
    kept: list[torch.Tensor] = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        learnable(draw(2, COLUMNS).requires_grad_())
    floats = [tensor for tensor in kept if tensor.is_floating_point()]
    assert floats
    assert all(tensor.numel() < ROWS * COLUMNS for tensor in floats)


def test_blocks_of_one_value_stay_finite():
    format = FORMATS["q4_1"]
    blocks = LearnableBlocks(format.quantize(torch.full((4, 64), 0.5)))
    move(blocks)
    assert torch.equal(blocks.packed().dequantize(), torch.full((4, 64), 0.5))


@pytest.fixture(scope="module")
def packed_folder(float_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "q4_1"
    quantize_checkpoint(float_model, out, format="q4_1", uniform=True)
    return out


def test_a_whole_model_computes_as_before_and_a_tied_head_shares_its_scales(packed_folder):
    ids = torch.arange(12)[None]
    model = load_model(packed_folder)
    with torch.no_grad():
        before = model(ids).logits
    found = make_scales_learnable(model)
    result = model(ids).logits
    assert torch.equal(result, before)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = model.config.tie_word_embeddings
    assert isinstance(head, LearnableLinear)
    assert isinstance(embedding, LearnableEmbedding)
    assert (head.learnable is embedding.learnable) == tied
    result.square().sum().backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {id(p) for p in trained} == {id(p) for blocks in found.values() for p in blocks.parameters()}
    assert all(bool(parameter.grad.any()) for parameter in trained)
    embedding_name = next(name for name in found if name.endswith(("wte.weight", "embed_tokens.weight")))
    assert ("lm_head.weight" in found) != tied
    assert found[embedding_name] is embedding.learnable


def test_norms_are_trained_as_they_will_be_stored(packed_folder):
    ids = torch.arange(12)[None]
    model = load_model(packed_folder)
    with torch.no_grad():
        before = model(ids).logits
    make_scales_learnable(model)
    names = [name for name, p in model.named_parameters() if p.ndim == 1]
    norms = make_norms_learnable(model, dict.fromkeys(names, torch.bfloat16))
    assert norms
    assert all("norm" in name or "ln_" in name for name in norms)
    trained = {name: m.parametrizations[name.rpartition(".")[2]].original for name, m in norms.items()}
    model(ids).logits.square().sum().backward()
    for steps in trained.values():
        assert bool(steps.grad.any())
        steps.data += 0.1
    with torch.no_grad():
        assert not torch.equal(model(ids).logits, before)
    for name, module in norms.items():
        value = getattr(module, name.rpartition(".")[2])
        assert torch.equal(value, value.bfloat16().float())


def test_a_vectors_steps_are_shares_of_its_root_mean_square():
    first = torch.tensor([3.0, 4.0, 0.0, 0.0])
    steps = RoundedSteps(first, torch.float32)
    assert torch.equal(steps(torch.zeros(4)), first)
    assert torch.equal(steps(torch.full((4,), 0.5)), first + 1.25)
    half = RoundedSteps(first, torch.float16)
    moved = torch.full((4,), 0.1).requires_grad_()
    value = half(moved)
    assert torch.equal(value, (first + 0.25).half().float())
    value.sum().backward()
    assert torch.equal(moved.grad, torch.full((4,), 2.5))
