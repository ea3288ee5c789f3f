"""Blocks taken apart into scales and codes, and put together again, with torch operations on any device.

Codes are the numbers that d multiplies: `w = d * code + m`, without m in the symmetric formats, whose codes are signed.
"""

from __future__ import annotations

import torch

from quantlab.formats.arithmetic import pack_codes
from quantlab.formats.blocks import BLOCK_SIZE, BlockFormat


def scales_of(blocks: torch.Tensor, format: BlockFormat) -> tuple[torch.Tensor, torch.Tensor | None]:
    """d and m as fp32 [rows, blocks a row] of uint8 [rows, row_bytes]; m is None in formats without one."""
    header = _by_block(blocks, format)[..., : format.header_bytes].contiguous().view(torch.float16).to(torch.float32)
    return header[..., 0], header[..., 1] if format.has_minimum else None


def codes_of(blocks: torch.Tensor, format: BlockFormat) -> torch.Tensor:
    """The codes as fp32 [rows, columns] of uint8 [rows, row_bytes]: what the blocks say with d = 1 and m = 0."""
    d, m = scales_of(blocks, format)
    plain = with_scales(blocks, format, torch.ones_like(d), None if m is None else torch.zeros_like(m))
    return format.dequantize(plain)


def with_scales(blocks: torch.Tensor, format: BlockFormat, d: torch.Tensor, m: torch.Tensor | None) -> torch.Tensor:
    """A copy of uint8 [rows, row_bytes] with other scales [rows, blocks a row], rounded to fp16; codes stay."""
    result = blocks.detach().clone()
    scales = [d] if m is None else [d, m]
    header = torch.stack([scale.detach().to(torch.float16) for scale in scales], dim=2)
    _by_block(result, format)[..., : format.header_bytes] = header.view(torch.uint8)
    return result


def with_codes(blocks: torch.Tensor, format: BlockFormat, codes: torch.Tensor) -> torch.Tensor:
    """A copy of uint8 [rows, row_bytes] with other codes, whole numbers [rows, columns]; scales stay."""
    result = blocks.detach().clone()
    body = _by_block(result, format)[..., format.header_bytes :]
    if format.code_bits == 8:
        body[:] = codes.to(torch.int8).view(torch.uint8).reshape(body.shape)
    else:
        middle = 0 if format.has_minimum else 1 << (format.code_bits - 1)
        stored = (codes + middle).to(torch.uint8).reshape(-1, BLOCK_SIZE)
        body[:] = torch.cat(pack_codes(stored, format), dim=1).reshape(body.shape)
    return result


def _by_block(blocks: torch.Tensor, format: BlockFormat) -> torch.Tensor:
    return blocks.view(blocks.shape[0], -1, format.block_bytes)
