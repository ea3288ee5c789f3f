"""Layers over packed weights whose scales are trained: what a forward pass multiplies by is what will be written.

A block's weights move along two directions only, d and m, and these overlap: codes are positive, so a larger d raises
all weights as a larger m does. Trained are therefore the steps along two directions that are at right angles and of
equal length, in units of the block's first |d|: `shift` lifts all weights alike, `stretch` moves each by its code's
distance from the block's mean code. So one learning rate suits every layer and both kinds of number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from quantlab.formats import BlockFormat, PackedTensor
from quantlab.formats.blocks import BLOCK_SIZE, check_own_scales
from quantlab.formats.parts import codes_of, scales_of, with_codes, with_scales
from quantlab.nn.embedding import QuantEmbedding
from quantlab.nn.linear import QuantLinear
from quantlab.nn.packed_products import packed_linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GRADIENT_CHUNK = 1 << 22  # weights whose gradient is at hand at a time: 16 MB of fp32
MOST_LATENT_BITS = 5  # finer codes are near the float weights already


class LearnableBlocks(nn.Module):
    """The blocks of one matrix with trainable scales, and, if wanted, trainable codes.

    Parameters, all fp32: `stretch` and (in formats with m) `shift`, [rows, blocks a row], zero at the start; `latent`
    [rows, columns], real numbers whose nearest whole numbers are the codes, None while codes are frozen. Gradients pass
    straight through every rounding.

    Latent codes begin at the codes, half a code away from any other. Beginning where the float weights lie lets noise
    flip those that lie near a boundary, which destroys what GPTQ has balanced: the divergence was four times the
    start's after 40 steps.

    Args:
        packed: the blocks to start from; they are shared and never changed.
        train_codes: whether there is a `latent`.

    Raises:
        InputError: the format has one scale a tensor.
    """

    blocks: torch.Tensor
    unit: torch.Tensor
    mean: torch.Tensor
    spread: torch.Tensor

    def __init__(self, packed: PackedTensor, train_codes: bool = False) -> None:
        super().__init__()
        check_own_scales(packed.format, "training scales", "quantize the model to another format, or train its weights")
        self.format = packed.format
        d, m = scales_of(packed.blocks, packed.format)
        codes = codes_of(packed.blocks, packed.format)
        by_block = codes.view(*d.shape, BLOCK_SIZE)
        mean = by_block.mean(dim=2) if m is not None else torch.zeros_like(d)
        spread = (by_block - mean[..., None]).square().mean(dim=2).sqrt()
        for name, value in (("blocks", packed.blocks), ("unit", d.abs()), ("mean", mean)):
            self.register_buffer(name, value, persistent=False)
        self.register_buffer("spread", spread.clamp(min=1.0), persistent=False)  # all codes alike: d decides nothing
        self.stretch = nn.Parameter(torch.zeros_like(d))
        self.shift = None if m is None else nn.Parameter(torch.zeros_like(d))
        self.latent = nn.Parameter(codes) if train_codes else None
        self._code_range = (float(codes.min()), float(codes.max()))  # fewer levels than the format's stay fewer

    def scales(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """d and m before their rounding to fp16, fp32 [rows, blocks a row]."""
        d, m = scales_of(self.blocks, self.format)
        stretch = self.unit * self.stretch / self.spread
        if m is None or self.shift is None:
            return d + stretch, None
        return d + stretch, m + self.unit * self.shift - stretch * self.mean

    def coded(self) -> torch.Tensor:
        """The blocks with the current codes and the first scales, uint8 [rows, row_bytes]."""
        if self.latent is None:
            return self.blocks
        return with_codes(self.blocks, self.format, self.latent.detach().clamp(*self._code_range).round())

    @torch.no_grad()
    def packed(self) -> PackedTensor:
        """What the layers compute with now, and what is to be written."""
        return PackedTensor(with_scales(self.coded(), self.format, *self.scales()), self.format)

    @torch.no_grad()
    def keep_codes_in_range(self) -> None:
        """After an optimizer's step: bring latent codes back to where they still round to a code of the format."""
        if self.latent is not None:
            low, high = self._code_range
            self.latent.clamp_(low - 0.5, high + 0.5)


class LearnableLinear(QuantLinear):
    """A QuantLinear over `LearnableBlocks`. Shares bias and blocks with the layer it is made of."""

    def __init__(self, linear: QuantLinear, learnable: LearnableBlocks) -> None:
        nn.Module.__init__(self)
        _take_attributes(self, linear)
        self.weight, self.learnable = linear.weight, learnable
        self.register_parameter("bias", linear.bias)

    def packed_weight(self) -> PackedTensor:
        """The blocks with the current scales."""
        return self.learnable.packed()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]."""
        d, m = self.learnable.scales()
        blocks = with_scales(self.learnable.coded(), self.format, d, m)
        return _ScaledLinear.apply(input, d, m, self.learnable.latent, self.bias, blocks, self.format, self.transposed)


class LearnableEmbedding(QuantEmbedding):
    """A QuantEmbedding over `LearnableBlocks`, which a tied head shares."""

    def __init__(self, embedding: QuantEmbedding, learnable: LearnableBlocks) -> None:
        nn.Module.__init__(self)
        _take_attributes(self, embedding)
        self.weight, self.learnable = embedding.weight, learnable
        self.register_buffer("output_like", embedding.output_like, persistent=False)

    def packed_weight(self) -> PackedTensor:
        """The blocks with the current scales."""
        return self.learnable.packed()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Integer ids [...] -> [..., embedding_dim]."""
        d, m = self.learnable.scales()
        latent = self.learnable.latent
        ids = input.reshape(-1)
        chosen = [None if part is None else F.embedding(ids, part) for part in (d, m, latent)]
        codes = F.embedding(ids, self.learnable.coded())
        rows = _ScaledRows.apply(*chosen, codes, self.format, self.output_like.dtype)
        rows = rows.reshape(*input.shape, -1)
        return rows if self.scale is None else rows * torch.tensor(self.scale).to(rows.dtype)


def _take_attributes(module: nn.Module, other: nn.Module) -> None:
    """Sizes and options of the module it replaces; parameters and submodules are no plain attributes."""
    module.__dict__.update({name: value for name, value in vars(other).items() if not name.startswith("_")})


class _ScaledLinear(torch.autograd.Function):
    """`packed_linear` with gradients for the scales; keeps blocks, not weights, until the backward pass."""

    @staticmethod
    def forward(
        context: Any,  # autograd's own context object
        x: torch.Tensor,
        d: torch.Tensor,
        m: torch.Tensor | None,
        latent: torch.Tensor | None,
        bias: torch.Tensor | None,
        blocks: torch.Tensor,
        format: BlockFormat,
        transposed: bool,
    ) -> torch.Tensor:
        context.save_for_backward(x, blocks)
        context.format, context.scale_dtype = format, d.dtype
        return packed_linear(x, blocks, bias, format, transposed)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, blocks = context.saved_tensors
        needs_x, needs_d, needs_m, needs_latent, needs_bias, *_ = context.needs_input_grad
        for_x = for_bias = None
        if needs_x:
            for_x = gradient @ context.format.dequantize(blocks, gradient.dtype)
        rows = gradient.reshape(-1, gradient.shape[-1])
        if needs_bias:
            for_bias = rows.sum(dim=0)
        scales: list[torch.Tensor | None] = [None, None, None]
        if needs_d or needs_m or needs_latent:
            columns = x.reshape(-1, x.shape[-1])
            step = max(1, GRADIENT_CHUNK // columns.shape[1])
            parts = [
                _block_gradients(
                    rows[:, i : i + step].T @ columns, blocks[i : i + step], context.format, needs_m, needs_latent
                )
                for i in range(0, rows.shape[1], step)
            ]
            scales = [
                None if part[0] is None else torch.cat(part).to(context.scale_dtype)
                for part in zip(*parts, strict=True)
            ]
        return for_x, *scales, for_bias, None, None, None


class _ScaledRows(torch.autograd.Function):
    """Rows of blocks dequantized, with gradients for their scales."""

    @staticmethod
    def forward(
        context: Any,  # autograd's own context object
        d: torch.Tensor,
        m: torch.Tensor | None,
        latent: torch.Tensor | None,
        blocks: torch.Tensor,
        format: BlockFormat,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        scaled = with_scales(blocks, format, d, m)
        context.save_for_backward(scaled)
        context.format = format
        return format.dequantize(scaled, dtype)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (blocks,) = context.saved_tensors
        _, needs_m, needs_latent, *_ = context.needs_input_grad
        exact = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        scales = _block_gradients(exact, blocks, context.format, needs_m, needs_latent)
        return *scales, None, None, None


def _block_gradients(
    gradient: torch.Tensor, blocks: torch.Tensor, format: BlockFormat, needs_m: bool, needs_latent: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The gradients of d, m [rows, blocks a row] and latent codes [rows, columns] from that of the weights.

    w = d * code + m, so d's is the block's sum of code times gradient, m's the plain sum, a code's d times gradient.
    """
    by_block = gradient.view(gradient.shape[0], -1, BLOCK_SIZE)
    codes = codes_of(blocks, format).view_as(by_block)
    for_m = by_block.sum(dim=2) if needs_m else None
    for_latent = None
    if needs_latent:
        for_latent = (by_block * scales_of(blocks, format)[0][..., None]).view_as(gradient)
    return (by_block * codes).sum(dim=2), for_m, for_latent


class RoundedSteps(nn.Module):
    """A parametrization (torch.nn.utils.parametrize) of a vector: steps in units of its root mean square, from which
    the vector follows, rounded to the element type that it is stored in; gradients pass through the rounding.
    """

    first: torch.Tensor

    def __init__(self, first: torch.Tensor, stored: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("first", first.detach().clone(), persistent=False)
        self.unit, self.stored = float(first.detach().square().mean().sqrt()), stored

    def forward(self, steps: torch.Tensor) -> torch.Tensor:
        """Steps -> the vector."""
        exact = self.first + self.unit * steps
        return exact + (exact.to(self.stored).to(exact.dtype) - exact).detach()

    def right_inverse(self, value: torch.Tensor) -> torch.Tensor:
        """No steps, whatever the vector is: it is the first one."""
        return torch.zeros_like(value)


def make_scales_learnable(model: PreTrainedModel, train_codes: bool = False) -> dict[str, LearnableBlocks]:
    """Swap a packed model's layers, in place, for ones with trainable scales; every other parameter is frozen.

    Args:
        train_codes: whether codes of up to five bits are trained too.

    Returns:
        The trainable blocks by tensor name; those of a tied head stand under the embedding's.
    """
    model.requires_grad_(False)
    found: dict[str, LearnableBlocks] = {}
    of_weight: dict[int, LearnableBlocks] = {}  # by the address of the blocks, which a tied head shares
    for name, module in list(model.named_modules()):
        if not isinstance(module, (QuantLinear, QuantEmbedding)):
            continue
        address = module.weight.data_ptr()
        if address not in of_weight:
            latent = train_codes and module.format.code_bits <= MOST_LATENT_BITS
            of_weight[address] = found[f"{name}.weight"] = LearnableBlocks(module.packed_weight(), latent)
        learnable = of_weight[address]
        layer: nn.Module
        if isinstance(module, QuantLinear):
            layer = LearnableLinear(module, learnable)
        else:
            layer = LearnableEmbedding(module, learnable)
        model.set_submodule(name, layer)
    return found


def make_norms_learnable(model: PreTrainedModel, stored: dict[str, torch.dtype]) -> dict[str, nn.Module]:
    """Let the weights and biases of a model's normalization layers be trained in steps (see `RoundedSteps`).

    Args:
        stored: the element types of tensors by name.

    Returns:
        The modules whose attribute of the tensor's last name is now trained, by tensor name.
    """
    found: dict[str, nn.Module] = {}
    for name, module in list(model.named_modules()):
        if not type(module).__name__.endswith("Norm"):
            continue
        for kind, parameter in list(module.named_parameters(recurse=False)):
            steps = RoundedSteps(parameter, stored[f"{name}.{kind}"])
            if steps.unit > 0:
                parametrize.register_parametrization(module, kind, steps)
                found[f"{name}.{kind}"] = module
    for name, module in found.items():
        steps_of(module, name.rpartition(".")[2]).original.requires_grad_(True)
    return found


def steps_of(module: nn.Module, kind: str) -> Any:
    """The parametrization of a module's weight or bias: its first item is the `RoundedSteps`, `original` is trained."""
    parametrizations: Any = module.parametrizations
    return parametrizations[kind]
