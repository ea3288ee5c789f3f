"""Quantize and dequantize blocks: the native core on CPU, the same arithmetic in torch on every other device.

The order of operations is the format's definition, because it decides ties: an affine code is
`trunc((w - min) * (1 / d) + 0.5)` with d and its reciprocal in unrounded fp32, and d and min go to fp16 afterwards
(ggml-quants.c, quantize_row_q4_1_ref).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from quantlab import native
from quantlab.errors import InputError
from quantlab.formats.blocks import BLOCK_SIZE

if TYPE_CHECKING:
    from quantlab.formats.blocks import BlockFormat

CHUNK_ELEMENTS = 1 << 22  # weights converted to fp32 at a time: 16 MB, so that memory stays flat for any tensor


def quantize(weight: torch.Tensor, format: BlockFormat, name: str) -> torch.Tensor:
    """Pack [rows, columns] to uint8 [rows, row_bytes]; see `BlockFormat.quantize`."""
    rows, columns = weight.shape
    blocks = torch.empty(rows, format.row_bytes(columns), dtype=torch.uint8, device=weight.device)
    step = max(1, CHUNK_ELEMENTS // columns)
    for start in range(0, rows, step):
        chunk = weight[start : start + step].detach().to(torch.float32).contiguous()
        _check_weights(chunk, start, name)
        packed = _quantize_native(chunk, format) if weight.device.type == "cpu" else quantize_torch(chunk, format)
        _check_scales(packed, format, chunk, start, name)
        blocks[start : start + step] = packed
    return blocks


def dequantize(blocks: torch.Tensor, format: BlockFormat, dtype: torch.dtype | None) -> torch.Tensor:
    """Unpack uint8 [..., row_bytes] to [..., columns]; see `BlockFormat.dequantize`."""
    *leading, row_bytes = blocks.shape
    if blocks.dtype != torch.uint8 or row_bytes % format.block_bytes:
        raise ValueError(f"{format.name} blocks must be uint8 rows of a multiple of {format.block_bytes} bytes")
    rows = blocks.detach().reshape(-1, row_bytes).contiguous()
    if blocks.device.type == "cpu":
        weights = torch.from_numpy(native.dequantize(format.name, rows.numpy()))
    else:
        weights = dequantize_torch(rows, format)
    weights = weights.reshape(*leading, format.columns(row_bytes))
    return weights if dtype is None else weights.to(dtype)


def _quantize_native(weight: torch.Tensor, format: BlockFormat) -> torch.Tensor:
    return torch.from_numpy(native.quantize(format.name, weight.numpy(), format.levels))


def quantize_torch(weight: torch.Tensor, format: BlockFormat) -> torch.Tensor:
    """Pack fp32 [rows, columns] on any device with torch operations alone."""
    x = weight.reshape(-1, BLOCK_SIZE)
    if format.code_bits == 8:
        d, codes = _eight_bit_codes(x, format.levels)
        packed = torch.cat([_half_bytes(d), codes.to(torch.int8).view(torch.uint8)], dim=1)
    else:
        d, minimum, codes = _affine_codes(x, format) if format.has_minimum else _symmetric_codes(x, format)
        scales = [_half_bytes(d)] + ([_half_bytes(minimum)] if format.has_minimum else [])
        packed = torch.cat([*scales, *_pack_codes(codes, format)], dim=1)
    return packed.reshape(weight.shape[0], -1)


def dequantize_torch(blocks: torch.Tensor, format: BlockFormat) -> torch.Tensor:
    """Unpack uint8 [rows, row_bytes] on any device with torch operations alone, to fp32 [rows, columns]."""
    x = blocks.reshape(-1, format.block_bytes)
    d = _halves(x[:, :2])
    body = x[:, format.header_bytes :]
    if format.code_bits == 8:
        weights = body.contiguous().view(torch.int8).to(torch.float32) * d
    elif format.has_minimum:
        weights = _unpack_codes(body, format).to(torch.float32) * d + _halves(x[:, 2:4])
    else:
        weights = (_unpack_codes(body, format) - (1 << (format.code_bits - 1))).to(torch.float32) * d
    return weights.reshape(blocks.shape[0], -1)


def _affine_codes(x: torch.Tensor, format: BlockFormat) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """d, minimum [blocks, 1] and codes [blocks, 32]."""
    # By index, not by amin and amax: among -0.0 and 0.0 the first counts, as in C.
    minimum = x.gather(1, x.argmin(dim=1, keepdim=True))
    maximum = x.gather(1, x.argmax(dim=1, keepdim=True))
    d = (maximum - minimum) / (format.levels - 1)
    codes = _truncate((x - minimum) * _reciprocal(d) + 0.5, format.levels)
    return d, minimum, codes


def _symmetric_codes(x: torch.Tensor, format: BlockFormat) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """d [blocks, 1], the same again in the minimum's place, and codes [blocks, 32] around the format's own middle."""
    middle, own_middle = format.levels // 2, 1 << (format.code_bits - 1)
    extreme = x.gather(1, x.abs().argmax(dim=1, keepdim=True))
    d = extreme / -middle
    codes = _truncate(x * _reciprocal(d) + torch.where(_vanishes(d), 0, middle + 0.5), format.levels)
    return d, d, codes + (own_middle - middle)


def _eight_bit_codes(x: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """d [blocks, 1] and signed codes [blocks, 32], rounded half away from zero as C's roundf does."""
    d = x.abs().amax(dim=1, keepdim=True) / ((levels - 1) // 2)
    scaled = x * _reciprocal(d)
    magnitude = scaled.abs()
    whole = magnitude.floor()
    return d, scaled.sign() * (whole + (2 * (magnitude - whole)).floor())


def _reciprocal(d: torch.Tensor) -> torch.Tensor:
    return torch.where((d == 0) | _vanishes(d), 0, 1 / d)


def _vanishes(d: torch.Tensor) -> torch.Tensor:
    """Whether 1 / d is beyond fp32: d is zero in fp16 then, and all codes of the block are 0, as gguf's are on x86."""
    return (d != 0) & (1 / d).isinf()


def _truncate(codes: torch.Tensor, levels: int) -> torch.Tensor:
    return codes.trunc().clamp(0, levels - 1).to(torch.uint8)


def _pack_codes(codes: torch.Tensor, format: BlockFormat) -> list[torch.Tensor]:
    low, high = codes[:, :16] & 0x0F, codes[:, 16:] & 0x0F
    nibbles = low | (high << 4)
    if format.code_bits == 4:
        return [nibbles]
    bits = (codes >> 4).reshape(-1, 4, 8) << torch.arange(8, dtype=torch.uint8, device=codes.device)
    return [bits.sum(dim=2, dtype=torch.uint8), nibbles]


def _unpack_codes(body: torch.Tensor, format: BlockFormat) -> torch.Tensor:
    """Codes as int16 [blocks, 32]."""
    nibbles = body[:, format.code_bits == 5 and 4 :]
    codes = torch.cat([nibbles & 0x0F, nibbles >> 4], dim=1)
    if format.code_bits == 5:
        positions = torch.arange(8, dtype=torch.uint8, device=body.device)
        fifth = (body[:, :4, None] >> positions) & 1
        codes = codes | (fifth.reshape(-1, BLOCK_SIZE) << 4)
    return codes.to(torch.int16)


def _half_bytes(x: torch.Tensor) -> torch.Tensor:
    """fp32 [blocks, 1] -> the two bytes of its fp16, [blocks, 2]."""
    return x.to(torch.float16).contiguous().view(torch.uint8)


def _halves(two_bytes: torch.Tensor) -> torch.Tensor:
    return two_bytes.contiguous().view(torch.float16).to(torch.float32)


def _check_weights(chunk: torch.Tensor, first_row: int, name: str) -> None:
    finite = chunk.isfinite()
    if not bool(finite.all()):
        row, column = (int(i) for i in (~finite).nonzero()[0])
        value = float(chunk[row, column])
        raise InputError(f"{name}: row {first_row + row}, column {column} is {value}; the checkpoint is damaged")


def _check_scales(packed: torch.Tensor, format: BlockFormat, chunk: torch.Tensor, first_row: int, name: str) -> None:
    header = packed.reshape(packed.shape[0], -1, format.block_bytes)[:, :, : format.header_bytes]
    finite = header.contiguous().view(torch.float16).isfinite().all(dim=2)
    if not bool(finite.all()):
        row, block = (int(i) for i in (~finite).nonzero()[0])
        columns = slice(block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE)
        raise InputError(
            f"{name}: row {first_row + row}, columns {columns.start} to {columns.stop - 1}: the {format.name} scale "
            f"overflows fp16 (weights reach {float(chunk[row, columns].abs().max()):g}); leave this tensor unquantized"
        )


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, weight: torch.Tensor, format: BlockFormat) -> torch.Tensor:  # Any: autograd's context
        return format.quantize(weight).dequantize(weight.dtype)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


def fake_quantize(weight: torch.Tensor, format: BlockFormat) -> torch.Tensor:
    """See `BlockFormat.fake_quantize`."""
    return _StraightThrough.apply(weight, format)
