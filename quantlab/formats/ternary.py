"""One scale a tensor and three codes, with torch operations on any device: the arithmetic of tq2_0.

The scale gamma is the mean magnitude of all weights and a code the nearest of -1, 0 and 1 to w / gamma, as BitNet b1.58
has it (Ma et al. 2024, arXiv 2402.17764). So that every implementation finds the same bits:

* The magnitudes of a block of 256 are added in fp64 by halving: the upper half of the row of numbers is added to the
  lower until one is left. The blocks' sums, in row-major order and filled up with zeros to a power of two, likewise.
* gamma is the mean, rounded to fp32 and then to fp16.
* RoundClip(w / (gamma + eps), -1, 1) needs no division: w is above t = 0.5 * (gamma + 1e-5), computed in fp32, or below
  -t, or 0. Where gamma is 0, all codes are.
* A block's d is gamma, or 0 where all its codes are 0: what `gguf.quants` writes for the rounded weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from quantlab.formats.blocks import BlockFormat

EPSILON = np.float32(1e-5)  # keeps the weights of a tensor that is nearly zero from being scaled up (BitNet b1.58)
ZERO_CODES = 0b01010101  # four weights of code 1, which stands for 0


def magnitude_sums(weight: torch.Tensor, format: BlockFormat) -> torch.Tensor:
    """The sum of the magnitudes of each block of fp32 [rows, columns]: fp64 [rows * blocks a row]."""
    return _halved(weight.reshape(-1, format.block_size).abs().to(torch.float64))


def tensor_scale(sums: torch.Tensor, format: BlockFormat) -> float:
    """gamma, an fp16 number, of a tensor whose blocks have these `sums`; infinity or NaN where it cannot be had."""
    size = 1 << (sums.numel() - 1).bit_length()
    total = _halved(torch.nn.functional.pad(sums.reshape(1, -1), (0, size - sums.numel())))
    return scale_of_mean(float(total) / (sums.numel() * format.block_size))


def scale_of_mean(mean: float) -> float:
    """The mean magnitude of a tensor's weights, rounded to fp32 and then to fp16."""
    with np.errstate(over="ignore"):
        return float(np.float16(np.float32(mean)))


def threshold(gamma: float) -> float:
    """The magnitude, an fp32 number, above which a weight's code is not zero."""
    return float(np.float32(0.5) * (np.float32(gamma) + EPSILON)) if gamma > 0 else float("inf")


def quantize_ternary(weight: torch.Tensor, format: BlockFormat, gamma: float) -> torch.Tensor:
    """Pack finite fp32 [rows, columns] to uint8 [rows, row_bytes]; `gamma` is the whole tensor's."""
    blocks = weight.reshape(-1, format.block_size)
    t = threshold(gamma)
    codes = 1 + (blocks > t).to(torch.uint8) - (blocks < -t).to(torch.uint8)
    d = torch.where((codes != 1).any(dim=1, keepdim=True), gamma, 0.0).to(torch.float16)
    packed = torch.cat([pack_twos(codes), d.contiguous().view(torch.uint8)], dim=1)
    return packed.reshape(weight.shape[0], -1)


def pack_twos(codes: torch.Tensor) -> torch.Tensor:
    """Codes of two bits, uint8 [blocks, 256], to the bytes of a block, [blocks, 64]."""
    fields = codes.reshape(-1, 2, 4, 32)
    low, high = fields[:, :, 0] | (fields[:, :, 1] << 2), (fields[:, :, 2] << 4) | (fields[:, :, 3] << 6)
    return (low | high).reshape(-1, 64)


def unpack_twos(body: torch.Tensor) -> torch.Tensor:
    """The codes, uint8 [blocks, 256], of the bytes of blocks, [blocks, 64]."""
    places = torch.arange(0, 8, 2, dtype=torch.uint8, device=body.device)[:, None]
    return ((body.reshape(-1, 2, 1, 32) >> places) & 3).reshape(-1, 256)


def _halved(numbers: torch.Tensor) -> torch.Tensor:
    """The sums of rows whose length is a power of two: the upper half is added to the lower until one is left."""
    while numbers.shape[1] > 1:
        low, high = numbers.chunk(2, dim=1)
        numbers = low + high
    return numbers[:, 0]
