"""A linear layer whose weight stays in blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from quantlab.errors import InputError
from quantlab.formats import BlockFormat, PackedTensor
from quantlab.nn.int8 import int8_linear
from quantlab.nn.packed_products import packed_linear, tiled_input_gradient, tiled_linear

ACTIVATIONS = ("float", "int8")


class QuantLinear(nn.Linear):
    """`y = x W^T + b` with W dequantized for the moment of use, in the activations' dtype and in every grad mode.

    `weight` is a uint8 Parameter [out_features, row_bytes] without gradient: it saves, shards and ties like any weight.
    The input's gradient is computed from the blocks too; no float copy of W outlives a call. Where a gradient will be
    wanted, large layers are multiplied in tiles (`tiled_linear`), and the last bits may differ from the float layer's;
    without gradients they are the same. Subclassing nn.Linear lets peft's `all-linear` find it.

    With `activations="int8"` the input is rounded in runs of 32, or in whole tokens if the format has it so, and
    multiplied straight from the blocks, as the native engine does it, bit for bit (`int8_linear`). That works on CPU
    alone, with whole tokens elsewhere too, up to the last bits. The input's gradient is that of float
    activations: rounding passes it straight through, as in quantization-aware training. The attribute may be set at
    any time (`set_activations` does for a whole model); it is a way to compute and is not saved.

    Args:
        in_features: columns of W, a multiple of the format's block size.
        out_features: rows of W.
        bias: whether there is a bias, of `dtype`.
        format: the weight's block format.
        transposed: multiply as GPT-2's Conv1D does, x @ W[in, out], so that the result is that of the float model to
            the last bit. int8 activations leave no choice of order.
        activations: "float" or "int8".

    Raises:
        InputError: `activations` is neither.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        format: BlockFormat,
        transposed: bool = False,
        activations: str = "float",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate the float weight
        self.in_features, self.out_features = in_features, out_features
        self.format, self.transposed = format, transposed
        self.activations = checked_activations(activations)
        blocks = torch.zeros(out_features, format.row_bytes(in_features), dtype=torch.uint8, device=device)
        self.weight = nn.Parameter(blocks, requires_grad=False)
        self.register_parameter(
            "bias", nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None
        )

    def packed_weight(self) -> PackedTensor:
        """The weight's blocks, shared with the module."""
        return PackedTensor(self.weight.data, self.format)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]."""
        if torch.is_grad_enabled() and (input.requires_grad or (self.bias is not None and self.bias.requires_grad)):
            return _PackedLinear.apply(input, self.weight, self.bias, self.format, self.transposed, self.activations)
        if self.activations == "int8":
            return int8_linear(input, self.weight, self.bias, self.format)
        return packed_linear(input, self.weight, self.bias, self.format, self.transposed)

    def reset_parameters(self) -> None:
        """Nothing: blocks come from a checkpoint."""

    def extra_repr(self) -> str:
        activations = "" if self.activations == "float" else f", activations={self.activations}"
        return f"{super().extra_repr()}, format={self.format.name}{activations}"


def checked_activations(activations: str) -> str:
    """That word, if it is one of `ACTIVATIONS`.

    Raises:
        InputError: it is not.
    """
    if activations not in ACTIVATIONS:
        raise InputError(f"activations {activations!r}: choose one of: {', '.join(ACTIVATIONS)}")
    return activations


def set_activations(model: nn.Module, activations: str) -> list[str]:
    """Let every `QuantLinear` in `model` compute in these activations.

    Returns:
        The layers' names.

    Raises:
        InputError: `activations` is none of `ACTIVATIONS`.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    for layer in layers.values():
        layer.activations = checked_activations(activations)
    return list(layers)


class _PackedLinear(torch.autograd.Function):
    """Keeps the blocks, not the dequantized weight, between forward and backward."""

    @staticmethod
    def forward(
        context: Any,  # autograd's own context object
        x: torch.Tensor,
        blocks: torch.Tensor,
        bias: torch.Tensor | None,
        format: BlockFormat,
        transposed: bool,
        activations: str,
    ) -> torch.Tensor:
        context.save_for_backward(blocks)
        context.format, context.dtype = format, x.dtype
        context.bias_dtype = None if bias is None else bias.dtype
        if activations == "int8":
            return int8_linear(x, blocks, bias, format)
        if transposed:  # in GPT-2 alone, whose layers are small: its own order of sums, and so its bits
            return packed_linear(x, blocks, bias, format, transposed)
        return tiled_linear(x, blocks, bias, format)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (blocks,) = context.saved_tensors
        input_gradient = bias_gradient = None
        if context.needs_input_grad[0]:
            input_gradient = tiled_input_gradient(gradient, blocks, context.format).to(context.dtype)
        if context.bias_dtype is not None and context.needs_input_grad[2]:
            bias_gradient = gradient.reshape(-1, gradient.shape[-1]).sum(dim=0).to(context.bias_dtype)
        return input_gradient, None, bias_gradient, None, None, None
