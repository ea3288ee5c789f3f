"""Activations in int8 with one scale a token, by torch operations on any device: the scheme of ternary weights.

BitNet b1.58 (Ma et al. 2024, arXiv 2402.17764) rounds the input of each ternary layer so. On a CPU the native core
multiplies (`nn.int8`); here are the same codes and scales, and a product whose sums differ from the core's in the last
bits of fp32: codes and ternary weights are whole numbers, which fp32 adds exactly up to 2^24.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from quantlab.formats import BlockFormat

LARGEST = 127


class TokenCodes(NamedTuple):
    """int8 codes [..., in] and fp32 scales [..., 1]; a token that holds NaN or infinity has codes 0 and scale NaN."""

    codes: torch.Tensor
    scales: torch.Tensor

    def values(self, dtype: torch.dtype) -> torch.Tensor:
        """The activations that the codes stand for, computed in fp32."""
        return (self.codes.to(torch.float32) * self.scales).to(dtype)


def quantize_tokens(x: torch.Tensor) -> TokenCodes:
    """Round floating point [..., in] to whole multiples of each token's largest magnitude / 127, ties to even."""
    values = x.detach().to(torch.float32)
    scales = values.abs().amax(dim=-1, keepdim=True) / LARGEST
    is_finite = scales.isfinite()  # amax hands NaN on
    inverse = 1 / scales
    inverse = torch.where(is_finite & inverse.isfinite(), inverse, 0)  # beyond fp32 the codes are 0
    codes = torch.where(is_finite, values * inverse, 0).round()
    return TokenCodes(codes.to(torch.int8), torch.where(is_finite, scales, torch.nan))


def token_linear(
    x: torch.Tensor, blocks: torch.Tensor, bias: torch.Tensor | None, format: BlockFormat, dtype: torch.dtype
) -> torch.Tensor:
    """`x W^T + b` in `dtype` with x rounded by `quantize_tokens`.

    The matrix that is multiplied is W over its largest magnitude, -1, 0 and 1 for ternary blocks: exact in every dtype.

    Args:
        x: floating point [..., in].
        blocks: uint8 [out, row_bytes].
        bias: [out], added in fp32.
    """
    found = quantize_tokens(x)
    weight = format.dequantize(blocks, torch.float32)
    largest = weight.abs().amax()
    largest = torch.where(largest > 0, largest, 1)
    with torch.autocast(x.device.type, enabled=False):
        product = F.linear(found.codes.to(dtype), (weight / largest).to(dtype))
        result = product.to(torch.float32) * (found.scales * largest)
        if bias is not None:
            result += bias.detach()
    return result.to(dtype)
