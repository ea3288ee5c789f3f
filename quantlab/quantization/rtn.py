"""Round to nearest: each block between its own minimum and maximum, as llama.cpp does by default."""

from __future__ import annotations

import torch

from quantlab.formats import BlockFormat, PackedTensor


def round_to_nearest(weight: torch.Tensor, format: BlockFormat, name: str) -> PackedTensor:
    """Pack `weight` [out, in]; raises InputError naming `name` where it cannot be packed."""
    return format.quantize(weight, name)


def relative_error(weight: torch.Tensor, packed: PackedTensor) -> float:
    """Frobenius norm of the rounding error over that of the weight; 0 for an all-zero weight."""
    error = total = 0.0
    step = max(1, (1 << 22) // weight.shape[1])  # rows at a time: memory stays flat
    for start in range(0, weight.shape[0], step):
        original = weight[start : start + step].to(torch.float32)
        rounded = packed.format.dequantize(packed.blocks[start : start + step])
        error += float((rounded - original).square().sum(dtype=torch.float64))
        total += float(original.square().sum(dtype=torch.float64))
    return (error / total) ** 0.5 if total else 0.0
