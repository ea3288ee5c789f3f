"""Packed layers and the plain ones that compute the same."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from quantlab.formats import FORMATS
from quantlab.nn import QuantLinear

IN, OUT = 96, 64
FLOAT = torch.float32

OWN_SCALES = {name: row for name, row in FORMATS.items() if row.scale_of == "block"}
every_format = pytest.mark.parametrize("format", OWN_SCALES.values(), ids=OWN_SCALES)
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


def gradients(layer: nn.Module, x: torch.Tensor, upstream: torch.Tensor, autocast: bool = False):
    """The gradients of the input and, where there is one, of the bias."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        result = layer(x)
    result.backward(upstream.to(result.dtype))
    return x.grad, None if layer.bias is None else layer.bias.grad
