"""Round to nearest: each block between its own minimum and maximum, as llama.cpp does by default."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantlab.formats import BlockFormat, PackedTensor

if TYPE_CHECKING:
    import torch


def round_to_nearest(weight: torch.Tensor, format: BlockFormat, name: str) -> PackedTensor:
    """Pack `weight` [out, in]; raises InputError naming `name` where it cannot be packed."""
    return format.quantize(weight, name)


def round_and_measure(weight: torch.Tensor, format: BlockFormat, name: str) -> tuple[PackedTensor, float]:
    """`round_to_nearest` and the relative error of the result: on CPU in one pass over the weight."""
    from quantlab.formats import arithmetic

    if weight.device.type != "cpu" or not format.fits(tuple(weight.shape)):
        packed = format.quantize(weight, name)
        return packed, relative_error(weight, packed)
    blocks, error = arithmetic.quantize_and_measure(weight, format, name)
    return PackedTensor(blocks, format), error


def relative_error(weight: torch.Tensor, packed: PackedTensor) -> float:
    """Frobenius norm of the rounding error over that of the weight; 0 for an all-zero weight."""
    import torch

    error = total = 0.0
    step = max(1, (1 << 22) // weight.shape[1])  # rows at a time: memory stays flat
    for start in range(0, weight.shape[0], step):
        original = weight[start : start + step].to(torch.float32)
        rounded = packed.format.dequantize(packed.blocks[start : start + step])
        error += float((rounded - original).square().sum(dtype=torch.float64))
        total += float(original.square().sum(dtype=torch.float64))
    return (error / total) ** 0.5 if total else 0.0
