"""Blocks taken apart into scales and codes, and put together again, with torch operations on any device.

Codes are the numbers that d multiplies: `w = d * code + m`, without m in the symmetric formats, whose codes are signed.
"""

from __future__ import annotations

import torch

from quantlab.formats.arithmetic import pack_codes
from quantlab.formats.blocks import BlockFormat
from quantlab.formats.ternary import ZERO_CODES, pack_twos


def scales_of(blocks: torch.Tensor, format: BlockFormat) -> tuple[torch.Tensor, torch.Tensor | None]:
    """d and m as fp32 [rows, blocks a row] of uint8 [rows, row_bytes]; m is None in formats without one."""
    stored = _by_block(blocks, format)[..., format.scale_bytes]
    scales = stored.contiguous().view(torch.float16).to(torch.float32)
    return scales[..., 0], scales[..., 1] if format.has_minimum else None


def codes_of(blocks: torch.Tensor, format: BlockFormat) -> torch.Tensor:
    """The codes as fp32 [rows, columns] of uint8 [rows, row_bytes]: what the blocks say with d = 1 and m = 0."""
    d, m = scales_of(blocks, format)
    plain = with_scales(blocks, format, torch.ones_like(d), None if m is None else torch.zeros_like(m))
    return format.dequantize(plain)


def with_scales(blocks: torch.Tensor, format: BlockFormat, d: torch.Tensor, m: torch.Tensor | None) -> torch.Tensor:
    """A copy of uint8 [rows, row_bytes] with other scales [rows, blocks a row], rounded to fp16; codes stay.

    Formats with one scale a tensor keep d = 0 where all codes of a block stand for 0.
    """
    result = blocks.detach().clone()
    scales = [d] if m is None else [d, m]
    header = torch.stack([scale.detach().to(torch.float16) for scale in scales], dim=2)
    by_block = _by_block(result, format)
    if format.scale_of == "tensor":
        header[(by_block[..., format.code_bytes] == ZERO_CODES).all(dim=2)] = 0
    by_block[..., format.scale_bytes] = header.view(torch.uint8)
    return result


def with_codes(blocks: torch.Tensor, format: BlockFormat, codes: torch.Tensor) -> torch.Tensor:
    """A copy of uint8 [rows, row_bytes] with other codes, whole numbers [rows, columns]; scales stay."""
    result = blocks.detach().clone()
    body = _by_block(result, format)[..., format.code_bytes]
    if format.code_bits == 8:
        body[:] = codes.to(torch.int8).view(torch.uint8).reshape(body.shape)
        return result
    middle = 0 if format.has_minimum else 1 << (format.code_bits - 1)
    if format.code_bits == 2:
        middle = 1
    stored = (codes + middle).to(torch.uint8).reshape(-1, format.block_size)
    packed = pack_twos(stored) if format.code_bits == 2 else torch.cat(pack_codes(stored, format), dim=1)
    body[:] = packed.reshape(body.shape)
    return result


def _by_block(blocks: torch.Tensor, format: BlockFormat) -> torch.Tensor:
    return blocks.view(blocks.shape[0], -1, format.block_bytes)
