"""Layers over ternary blocks compute what plain layers with the decoded weights do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from quantlab.errors import InputError
from quantlab.formats import FORMATS, PackedTensor
from quantlab.nn import QuantEmbedding, QuantLinear
from quantlab.nn.learnable_scales import LearnableBlocks

ROWS, COLUMNS = 96, 512


def blocks() -> PackedTensor:
    return FORMATS["tq2_0"].quantize(torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)) * 0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_linear_layers_multiply_by_the_decoded_weights(dtype):
    packed = blocks()
    quantized = QuantLinear(COLUMNS, ROWS, bias=False, format=packed.format, dtype=dtype)
    assert quantized.weight.shape == (ROWS, 132)
    quantized.weight.data = packed.blocks
    plain = nn.Linear(COLUMNS, ROWS, bias=False, dtype=dtype)
    plain.weight.data = packed.dequantize(dtype)
    x = torch.randn(3, 5, COLUMNS, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        assert torch.equal(quantized(x), plain(x))
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    quantized(ours).float().square().sum().backward()
    plain(theirs).float().square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-2)


def test_tables_look_rows_up():
    packed = blocks()
    table = QuantEmbedding(ROWS, COLUMNS, format=packed.format)
    table.weight.data = packed.blocks
    ids = torch.tensor([[3, 95, 3], [0, 1, 2]])
    assert torch.equal(table(ids), packed.dequantize()[ids])


def test_scales_of_a_tensor_are_not_trained_block_by_block():
    with pytest.raises(InputError, match=r"^training scales needs blocks with scales of their own, and tq2_0 has one"):
        LearnableBlocks(blocks())
