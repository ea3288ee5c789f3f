"""Layers with float weights that compute with the blocks these round to: quantization-aware training.

What a forward pass multiplies by are the packed bytes that will be written, by the products of `QuantLinear` and
`QuantEmbedding`. Gradients pass straight through the rounding (Bengio et al. 2013, arXiv 1308.3432): a weight's is that
of a float layer which sees the same activations, an input's that of the blocks. Where activations are rounded with one
scale a token, that rounding is part of the model, and a weight's gradient sees what came of it (BitNet b1.58, Ma et al.
2024, arXiv 2402.17764); rounded in runs of 32 they are a way to compute, and gradients see them as they were.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from quantlab.formats import BlockFormat, PackedTensor
from quantlab.nn.int8 import int8_linear
from quantlab.nn.linear import checked_activations
from quantlab.nn.packed_products import packed_linear, tiled_input_gradient, tiled_linear
from quantlab.nn.token_int8 import TokenCodes, quantize_tokens


class FakeQuantLinear(nn.Linear):
    """A linear layer or Conv1D whose float weight is packed for every product.

    The parameters are those of the layer it replaces, in its layout ([in, out] of a Conv1D) and shared with whatever
    shares them: state dict and optimizer see the usual names. Where `enabled` is False it is that float layer.

    Blocks are kept from the forward to the backward pass (0.6 bytes a weight, beside the 16 of AdamW in fp32), and for
    as long as `held_blocks` says; nothing else keeps them, for fused optimizers do not mark the weights they change.

    Args:
        layer: nn.Linear, or transformers' Conv1D if `transposed`.
        format: of the blocks, which may use fewer levels than it has.
        activations: "float" or "int8"; see `QuantLinear`.
        name: what errors call the weight.

    Raises:
        InputError: `activations` is neither. On use: a weight is NaN or infinite, or a scale overflows fp16.
    """

    def __init__(
        self,
        layer: nn.Module,
        format: BlockFormat,
        *,
        transposed: bool = False,
        activations: str = "float",
        name: str = "tensor",
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate another weight
        weight, bias = layer.weight, layer.bias
        assert isinstance(weight, nn.Parameter)
        self.out_features, self.in_features = weight.shape[::-1] if transposed else weight.shape
        self.format, self.transposed, self.name = format, transposed, name
        self.activations, self.enabled = checked_activations(activations), True
        self.weight = weight
        self.register_parameter("bias", bias if isinstance(bias, nn.Parameter) else None)
        self._held: torch.Tensor | None = None

    def packed_weight(self) -> PackedTensor:
        """The blocks that a forward pass multiplies by."""
        return PackedTensor(self.blocks(), self.format)

    def blocks(self) -> torch.Tensor:
        """What products multiply by, uint8 [out, row_bytes]."""
        return self.pack() if self._held is None else self._held

    @contextmanager
    def held_blocks(self) -> Iterator[None]:
        """Pack once for all products meanwhile; weights must not change."""
        self._held = self.pack() if self.enabled else None
        try:
            yield
        finally:
            self._held = None

    def sources(self) -> tuple[torch.Tensor, ...]:
        """All that the blocks depend on."""
        return (self.weight,)

    @torch.no_grad()
    def pack(self) -> torch.Tensor:
        """The weight as blocks, in the format's own arithmetic."""
        return self.format.quantize(self._rows(), self.name).blocks

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]."""
        if not self.enabled:
            return self.float_product(input)
        blocks = self.blocks()
        trained = (input, self.bias, *self.sources())
        if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in trained):
            return self.product(input, blocks)
        return self.multiplied(input, blocks, tiled=False)

    @property
    def rounds_tokens(self) -> bool:
        """Whether activations are rounded with one scale a token."""
        return self.activations == "int8" and self.format.activations == "token"

    def product(self, input: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        """`multiplied` with gradients."""
        return _FakeQuantProduct.apply(input, self.weight, self.bias, blocks, self)

    def multiplied(self, input: torch.Tensor, blocks: torch.Tensor, *, tiled: bool) -> torch.Tensor:
        """What `QuantLinear` computes with these blocks, with (`tiled`) and without gradients."""
        if self.activations == "int8":
            return int8_linear(input, blocks, self.bias, self.format)
        if tiled and not self.transposed:
            return tiled_linear(input, blocks, self.bias, self.format)
        return packed_linear(input, blocks, self.bias, self.format, self.transposed)

    def float_product(self, input: torch.Tensor) -> torch.Tensor:
        """What the replaced layer computes."""
        weight = self.weight.to(input.dtype)
        if not self.transposed:
            return F.linear(input, weight, self.bias)
        rows = input.reshape(-1, input.shape[-1])
        result = rows @ weight if self.bias is None else torch.addmm(self.bias, rows, weight)
        return result.reshape(*input.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, format={self.format.name}, activations={self.activations}"

    def _rows(self) -> torch.Tensor:
        """The weight as [out, in]."""
        return self.weight.T.contiguous() if self.transposed else self.weight


class FakeQuantEmbedding(nn.Embedding):
    """An embedding table whose rows are packed and unpacked when they are looked up; see `FakeQuantLinear`.

    Args:
        embedding: the table it replaces, whose parameter it shares.
        scale: multiplies the output, as Gemma's embeddings do.
        dtype: of the output; that of the table if not given.
    """

    def __init__(
        self,
        embedding: nn.Embedding,
        format: BlockFormat,
        *,
        scale: float | None = None,
        dtype: torch.dtype | None = None,
        name: str = "tensor",
    ) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.padding_idx = embedding.padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self.format, self.scale, self.name, self.enabled = format, scale, name, True
        self.weight = embedding.weight
        self.output_dtype = self.weight.dtype if dtype is None else dtype

    def packed_weight(self) -> PackedTensor:
        """The table's blocks."""
        with torch.no_grad():
            return self.format.quantize(self.weight, self.name)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Integer ids [...] -> [..., embedding_dim]."""
        rows = F.embedding(input, self.weight, self.padding_idx)
        if self.enabled and self.format.scale_of == "tensor":
            rows = _Replaced.apply(rows, self.format.dequantize(self.packed_weight().blocks[input], rows.dtype))
        elif self.enabled:  # a row's blocks do not depend on other rows
            rows = self.format.fake_quantize(rows.reshape(-1, self.embedding_dim)).reshape(rows.shape)
        rows = rows.to(self.output_dtype)
        return rows if self.scale is None else rows * torch.tensor(self.scale).to(rows.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, format={self.format.name}"


FakeQuantLayer = FakeQuantLinear | FakeQuantEmbedding


def fake_quant_layers(model: nn.Module) -> Iterator[tuple[str, FakeQuantLayer]]:
    """Every such layer by its module's name, a tied head after its embedding."""
    for name, module in model.named_modules():
        if isinstance(module, (FakeQuantLinear, FakeQuantEmbedding)):
            yield name, module


def enable_fake_quant(model: nn.Module, enabled: bool) -> None:
    """Switch every layer's rounding on or off."""
    for _, layer in fake_quant_layers(model):
        layer.enabled = enabled


def kept_input(x: torch.Tensor, layer: FakeQuantLinear) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What a weight's gradient will need of a layer's input: x, or its codes and scales where tokens are rounded."""
    return quantize_tokens(x) if layer.rounds_tokens else (x, None)


def seen_input(kept: torch.Tensor, scales: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """The activations that met the weight, [tokens, in], of what `kept_input` gave."""
    values = kept.to(dtype) if scales is None else TokenCodes(kept, scales).values(dtype)
    return values.reshape(-1, kept.shape[-1])


class _Replaced(torch.autograd.Function):
    """Other values in place of these, whose gradient they pass on."""

    @staticmethod
    def forward(context: Any, values: torch.Tensor, others: torch.Tensor) -> torch.Tensor:  # Any: autograd's context
        return others

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


class _FakeQuantProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any,  # autograd's own context object
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        blocks: torch.Tensor,
        layer: FakeQuantLinear,
    ) -> torch.Tensor:
        kept, scales = kept_input(x, layer) if context.needs_input_grad[1] else (None, None)
        context.save_for_backward(kept, scales, blocks)
        context.format, context.transposed = layer.format, layer.transposed
        context.dtype, context.weight_dtype = x.dtype, weight.dtype
        context.bias_dtype = None if bias is None else bias.dtype
        return layer.multiplied(x, blocks, tiled=True)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        kept, scales, blocks = context.saved_tensors
        needs_x, needs_weight, needs_bias, *_ = context.needs_input_grad
        for_x = for_weight = for_bias = None
        if needs_x:
            for_x = tiled_input_gradient(gradient, blocks, context.format).to(context.dtype)
        rows = gradient.reshape(-1, gradient.shape[-1])
        if needs_weight:
            inputs, outputs = seen_input(kept, scales, context.weight_dtype), rows.to(context.weight_dtype)
            for_weight = inputs.T @ outputs if context.transposed else outputs.T @ inputs
        if needs_bias:
            for_bias = rows.sum(dim=0).to(context.bias_dtype)
        return for_x, for_weight, for_bias, None, None
