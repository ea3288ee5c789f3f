"""A LoRA whose sum with the float weights is packed for every product, so that it needs no fusing.

The update has the arithmetic of `native.adapters`, and blocks that of the format: both run on the CPU wherever the
layer is, for bytes are to be the same everywhere.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from quantlab.formats.arithmetic import lent_array
from quantlab.native import adapters as native_adapters
from quantlab.nn.fake_quant import FakeQuantLinear, kept_input, seen_input
from quantlab.nn.packed_products import tiled_input_gradient

TILE_WEIGHTS = 1 << 22  # of the rows whose sum is held in fp32 at a time, where blocks do not depend on one another


class FakeQuantLoraLinear(FakeQuantLinear):
    """`x Q^T + b`, Q being the blocks of `W + scale * lora_B @ lora_A`; W is frozen, the factors are trained in fp32.

    The factors' gradients are those of an ordinary LoRA. `lora_A` [rank, in] begins Gaussian with a standard deviation
    of 1 / rank, `lora_B` [out, rank] at zero.

    Args:
        layer: the fake-quantized layer that it replaces.
        rank: of the update.
        scale: of the update.
    """

    def __init__(self, layer: FakeQuantLinear, rank: int, scale: float) -> None:
        super().__init__(
            layer, layer.format, transposed=layer.transposed, activations=layer.activations, name=layer.name
        )
        self.scale = scale
        device = self.weight.device
        a = torch.randn(rank, self.in_features) / rank  # drawn on the CPU: the same on every device
        self.lora_A = nn.Parameter(a.to(device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, device=device))

    def sources(self) -> tuple[torch.Tensor, ...]:
        return self.weight, self.lora_A, self.lora_B

    @torch.no_grad()
    def pack(self) -> torch.Tensor:
        rows = self._rows().to("cpu", torch.float32)
        a, b = (factor.detach().to("cpu", torch.float32).contiguous() for factor in (self.lora_A, self.lora_B))
        step = max(1, TILE_WEIGHTS // self.in_features if self.format.scale_of == "block" else len(rows))
        tiles = [self._packed_tile(rows[i : i + step], a, b[i : i + step]) for i in range(0, len(rows), step)]
        return torch.cat(tiles).to(self.weight.device)

    def _packed_tile(self, rows: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        update = native_adapters.low_rank_product(
            lent_array(a), lent_array(b), self.scale, threads=torch.get_num_threads()
        )
        return self.format.quantize(torch.from_numpy(update) + rows, self.name).blocks

    def product(self, input: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        return _LoraProduct.apply(input, self.bias, self.lora_A, self.lora_B, blocks, self)

    def float_product(self, input: torch.Tensor) -> torch.Tensor:
        update = F.linear(F.linear(input.to(self.lora_A.dtype), self.lora_A), self.lora_B)
        return super().float_product(input) + (self.scale * update).to(input.dtype)


class _LoraProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any,  # autograd's own context object
        x: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        blocks: torch.Tensor,
        layer: FakeQuantLoraLinear,
    ) -> torch.Tensor:
        context.save_for_backward(*kept_input(x, layer), a, b, blocks)
        context.format, context.scale, context.dtype = layer.format, layer.scale, x.dtype
        context.bias_dtype = None if bias is None else bias.dtype
        return layer.multiplied(x, blocks, tiled=True)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        kept, scales, a, b, blocks = context.saved_tensors
        for_x = for_bias = None
        if context.needs_input_grad[0]:
            for_x = tiled_input_gradient(gradient, blocks, context.format).to(context.dtype)
        rows = gradient.reshape(-1, gradient.shape[-1]).to(a.dtype)
        inputs = seen_input(kept, scales, a.dtype)
        for_a = context.scale * ((rows @ b).T @ inputs)
        for_b = context.scale * (rows.T @ (inputs @ a.T))
        if context.bias_dtype is not None and context.needs_input_grad[1]:
            for_bias = rows.sum(dim=0).to(context.bias_dtype)
        return for_x, for_bias, for_a, for_b, None, None
