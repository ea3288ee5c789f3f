"""peft layers whose forward pass computes with the blocks that fusing would write; see `fusing`.

Gradients reach the factors as if rounding were not there (straight-through, Bengio et al. 2013, arXiv 1308.3432): those
of an ordinary LoRA. The input's gradient is that of the fused weights.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn

from quantlab.adapters.fusing import Fusion, fused_blocks
from quantlab.formats.arithmetic import lent_array
from quantlab.formats.blocks import BLOCK_SIZE, BlockFormat
from quantlab.nn import QuantLinear
from quantlab.nn.int8 import int8_linear
from quantlab.nn.packed_products import packed_linear, tiled_input_gradient, tiled_linear


class FusedLoraLinear(LoraLinear):
    """A LoRA layer over a `QuantLinear` that computes `x W'^T + b`, W' being the base's blocks with the update fused.

    At most one adapter is active, and its dropout is 0: a fused weight has neither a second adapter nor dropout.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, *, fusion: Fusion, **kwargs: Any) -> None:
        self.fusion = fusion  # before peft's own, which calls update_layer
        super().__init__(base_layer, adapter_name, **kwargs)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        """With block-sum, `lora_A` is [rank, in / 32] and reads sums of blocks."""
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)
        if self.fusion.method == "block-sum":
            self.lora_A[adapter_name] = nn.Linear(self.in_features // BLOCK_SIZE, r, bias=False)
            self.reset_lora_parameters(adapter_name, config.init_lora_weights)
            self._move_adapter_to_device_of_base_layer(adapter_name)
            self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]."""
        base = self.get_base_layer()
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or not active:
            return base(x)
        (name,) = active
        factors = self.lora_A[name].weight, self.lora_B[name].weight
        if torch.is_grad_enabled():
            return _FusedProduct.apply(x, base.bias, *factors, base, self.scaling[name], self.fusion)
        return _multiplied(x, fused_weight(base, *factors, self.scaling[name], self.fusion), base, tiled=False)


def fused_weight(base: QuantLinear, a: torch.Tensor, b: torch.Tensor, scale: float, fusion: Fusion) -> torch.Tensor:
    """The blocks, uint8 [out, row_bytes], that fusing these factors into `base` writes.

    The arithmetic is the native core's, on the CPU, wherever the layer is: bytes are to be the same everywhere.
    """
    blocks = fused_blocks(
        base.format,
        lent_array(base.weight.detach().cpu().contiguous()),
        lent_array(a.detach().to("cpu", torch.float32).contiguous()),
        lent_array(b.detach().to("cpu", torch.float32).contiguous()),
        scale,
        fusion,
        threads=torch.get_num_threads(),
    )
    return torch.from_numpy(blocks).to(base.weight.device)


def _multiplied(x: torch.Tensor, blocks: torch.Tensor, base: QuantLinear, *, tiled: bool) -> torch.Tensor:
    """What `base` would compute with other blocks, as `QuantLinear` does it with and without gradients."""
    if base.activations == "int8":
        return int8_linear(x, blocks, base.bias, base.format)
    if tiled and not base.transposed:
        return tiled_linear(x, blocks, base.bias, base.format)
    return packed_linear(x, blocks, base.bias, base.format, base.transposed)


class _FusedProduct(torch.autograd.Function):
    """Keeps the input and the factors; the fused blocks are made again for the backward pass, which costs less than
    holding every layer's.
    """

    @staticmethod
    def forward(
        context: Any,  # autograd's own context object
        x: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        base: QuantLinear,
        scale: float,
        fusion: Fusion,
    ) -> torch.Tensor:
        context.save_for_backward(x, a, b)
        context.base, context.scale, context.fusion = base, scale, fusion
        context.bias_dtype = None if bias is None else bias.dtype
        return _multiplied(x, fused_weight(base, a, b, scale, fusion), base, tiled=True)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, a, b = context.saved_tensors
        format: BlockFormat = context.base.format
        x_gradient = bias_gradient = None
        if context.needs_input_grad[0]:
            blocks = fused_weight(context.base, a, b, context.scale, context.fusion)
            x_gradient = tiled_input_gradient(gradient, blocks, format).to(x.dtype)
        rows = gradient.reshape(-1, gradient.shape[-1]).to(a.dtype)
        inputs = x.reshape(-1, x.shape[-1]).to(a.dtype)
        if context.fusion.method == "block-sum":
            inputs = inputs.reshape(len(inputs), -1, BLOCK_SIZE).sum(dim=2)
        a_gradient = context.scale * ((rows @ b).T @ inputs)
        b_gradient = context.scale * (rows.T @ (inputs @ a.T))
        if context.bias_dtype is not None and context.needs_input_grad[1]:
            bias_gradient = rows.sum(dim=0).to(context.bias_dtype)
        return x_gradient, bias_gradient, a_gradient, b_gradient, None, None, None
