"""Quantize and dequantize blocks: the native core on CPU, the same arithmetic in torch on every other device.

The order of operations is the format's definition, because it decides ties: an affine code is
`trunc((w - min) * (1 / d) + 0.5)` with d and its reciprocal in unrounded fp32, and d and min go to fp16 afterwards
(ggml-quants.c, quantize_row_q4_1_ref).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from quantlab import native
from quantlab.errors import InputError
from quantlab.formats import ternary
from quantlab.formats.blocks import BLOCK_SIZE
from quantlab.formats.packing import TensorScale, pack_rows, scale_overflow, tensor_scale_overflow

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from quantlab.formats.blocks import BlockFormat

CHUNK_ELEMENTS = 1 << 22  # weights converted or gathered at a time: 16 MB of fp32, so that memory stays flat

# What the native core reads and writes as it is; every other type goes by way of fp32.
_ELEMENTS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


def quantize(weight: torch.Tensor, format: BlockFormat, name: str) -> torch.Tensor:
    """Pack [rows, columns] to uint8 [rows, row_bytes]; see `BlockFormat.quantize`."""
    if weight.device.type == "cpu":
        return _quantize_native(weight, format, name, measure=False)[0]
    blocks = _empty_blocks(weight, format)
    gamma = _tensor_scale(weight, format, name) if format.scale_of == "tensor" else None
    for start, chunk in _chunks(weight, torch.float32):
        if gamma is None:
            _check_weights(chunk, start, name)
            packed = quantize_torch(chunk, format)
            _check_scales(packed, format, chunk, start, name)
        else:
            packed = ternary.quantize_ternary(chunk, format, gamma)
        blocks[start : start + len(chunk)] = packed
    return blocks


def quantize_and_measure(weight: torch.Tensor, format: BlockFormat, name: str) -> tuple[torch.Tensor, float]:
    """`quantize` of a weight on CPU, and in the same pass its relative error (`native.relative_error`)."""
    blocks, sums = _quantize_native(weight, format, name, measure=True)
    return blocks, native.relative_error(np.concatenate(sums))


def dequantize(
    blocks: torch.Tensor, format: BlockFormat, dtype: torch.dtype | None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Unpack uint8 [..., row_bytes] to [..., columns]; see `BlockFormat.dequantize`."""
    *leading, row_bytes = blocks.shape
    if blocks.dtype != torch.uint8 or row_bytes % format.block_bytes:
        raise ValueError(f"{format.name} blocks must be uint8 rows of a multiple of {format.block_bytes} bytes")
    dtype = torch.float32 if dtype is None else dtype
    shape = (*leading, format.columns(row_bytes))
    if out is not None and (tuple(out.shape) != shape or out.dtype != dtype or not out.is_contiguous()):
        raise ValueError(f"out has shape {list(out.shape)} and {out.dtype}; expected contiguous {list(shape)} {dtype}")
    rows = blocks.detach().reshape(-1, row_bytes).contiguous()
    if out is not None and blocks.device.type == "cpu" and dtype in _ELEMENTS:
        _dequantize_native(rows, format, out.view(len(rows), shape[-1]))
        return out
    if blocks.device.type == "cpu":
        element = dtype if dtype in _ELEMENTS else torch.float32
        weights = _dequantize_native(rows, format, torch.empty(len(rows), shape[-1], dtype=element))
    else:
        weights = dequantize_torch(rows, format)
    weights = weights.reshape(shape).to(dtype)
    return weights if out is None else out.copy_(weights)


def _quantize_native(
    weight: torch.Tensor, format: BlockFormat, name: str, *, measure: bool
) -> tuple[torch.Tensor, list[npt.NDArray[np.float64]]]:
    """Blocks, and the rows' sums of squares chunk by chunk (none unless measured)."""
    blocks = _empty_blocks(weight, format)
    dtype = weight.dtype if weight.dtype in _ELEMENTS else torch.float32
    is_native = weight.dtype in _ELEMENTS and weight.is_contiguous()
    sums, element, threads, scale = [], _ELEMENTS[dtype], torch.get_num_threads(), None
    if format.scale_of == "tensor" and not is_native:
        whole = TensorScale(format, name, element=element, threads=threads)
        for _, chunk in _chunks(weight, dtype):
            whole.add(_raw(chunk))
        scale = whole.value()
    for start, chunk in [(0, weight.detach())] if is_native else _chunks(weight, dtype):
        packed = pack_rows(
            _raw(chunk),
            format,
            name,
            element=element,
            first_row=start,
            measure=measure,
            threads=threads,
            scale=scale,
            out=blocks[start : start + len(chunk)].numpy(),
        )
        if packed.sums is not None:
            sums.append(packed.sums)
    return blocks, sums


def _dequantize_native(rows: torch.Tensor, format: BlockFormat, weights: torch.Tensor) -> torch.Tensor:
    element, threads = _ELEMENTS[weights.dtype], torch.get_num_threads()
    native.dequantize(format.name, lent_array(rows), element=element, threads=threads, out=_raw(weights))
    return weights


def _chunks(weight: torch.Tensor, dtype: torch.dtype) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, some rows as a contiguous tensor of `dtype`), in order."""
    step = max(1, CHUNK_ELEMENTS // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        yield start, weight[start : start + step].detach().to(dtype).contiguous()


def _empty_blocks(weight: torch.Tensor, format: BlockFormat) -> torch.Tensor:
    return torch.empty(len(weight), format.row_bytes(weight.shape[1]), dtype=torch.uint8, device=weight.device)


def lent_array(tensor: torch.Tensor) -> np.ndarray:
    """A contiguous CPU tensor's memory as an array, for the length of a call.

    By DLPack: `Tensor.numpy` would keep the storage from ever being resized, as FSDP does with a weight after its use.
    """
    return np.from_dlpack(tensor.detach())


def _raw(tensor: torch.Tensor) -> npt.NDArray[np.uint8]:
    """The bytes of a contiguous tensor, [rows, bytes a row], without a copy."""
    return tensor.view(torch.uint8).numpy()


def quantize_torch(weight: torch.Tensor, format: BlockFormat) -> torch.Tensor:
    """Pack fp32 [rows, columns] on any device with torch operations alone; all of a tensor if that has one scale."""
    if format.scale_of == "tensor":
        gamma = ternary.tensor_scale(ternary.magnitude_sums(weight, format), format)
        return ternary.quantize_ternary(weight, format, gamma)
    x = weight.reshape(-1, BLOCK_SIZE)
    if format.code_bits == 8:
        d, codes = _eight_bit_codes(x, format.levels)
        packed = torch.cat([_half_bytes(d), codes.to(torch.int8).view(torch.uint8)], dim=1)
    else:
        d, minimum, codes = _affine_codes(x, format) if format.has_minimum else _symmetric_codes(x, format)
        scales = [_half_bytes(d)] + ([_half_bytes(minimum)] if format.has_minimum else [])
        packed = torch.cat([*scales, *pack_codes(codes, format)], dim=1)
    return packed.reshape(weight.shape[0], -1)


def dequantize_torch(blocks: torch.Tensor, format: BlockFormat) -> torch.Tensor:
    """Unpack uint8 [rows, row_bytes] on any device with torch operations alone, to fp32 [rows, columns]."""
    x = blocks.reshape(-1, format.block_bytes)
    scales, body = x[:, format.scale_bytes], x[:, format.code_bytes]
    d = _halves(scales[:, :2])
    if format.scale_of == "tensor":
        weights = (ternary.unpack_twos(body).to(torch.float32) - 1) * d
    elif format.code_bits == 8:
        weights = body.contiguous().view(torch.int8).to(torch.float32) * d
    elif format.has_minimum:
        weights = _unpack_codes(body, format).to(torch.float32) * d + _halves(scales[:, 2:])
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


def pack_codes(codes: torch.Tensor, format: BlockFormat) -> list[torch.Tensor]:
    """The bytes after the scales of four- and five-bit blocks, in parts, from stored codes, uint8 [blocks, 32]."""
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


def _tensor_scale(weight: torch.Tensor, format: BlockFormat, name: str) -> float:
    """gamma, after a look at every weight."""
    sums = []
    for start, chunk in _chunks(weight, torch.float32):
        _check_weights(chunk, start, name)
        sums.append(ternary.magnitude_sums(chunk, format))
    gamma = ternary.tensor_scale(torch.cat(sums), format)
    if gamma == float("inf"):
        raise tensor_scale_overflow(format, name)
    return gamma


def _check_scales(packed: torch.Tensor, format: BlockFormat, chunk: torch.Tensor, first_row: int, name: str) -> None:
    header = packed.reshape(packed.shape[0], -1, format.block_bytes)[:, :, format.scale_bytes]
    finite = header.contiguous().view(torch.float16).isfinite().all(dim=2)
    if not bool(finite.all()):
        row, block = (int(i) for i in (~finite).nonzero()[0])
        weights = chunk[row, block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE]
        raise scale_overflow(format, name, first_row + row, block, float(weights.abs().max()))


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
