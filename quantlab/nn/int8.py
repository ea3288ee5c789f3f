"""Multiplication of packed weights by activations rounded to int8: the native engine's arithmetic, for torch's CPU."""

from __future__ import annotations

import torch

from quantlab import native
from quantlab.formats import BlockFormat
from quantlab.formats.arithmetic import lent_array


def int8_linear(x: torch.Tensor, blocks: torch.Tensor, bias: torch.Tensor | None, format: BlockFormat) -> torch.Tensor:
    """`x W^T + b` with x rounded to int8 in runs of 32, as `native.multiply_int8` does it, straight from the blocks.

    Args:
        x: floating point [..., in] on CPU; other types than fp32 go by way of it.
        blocks: uint8 [out, row_bytes] on CPU.
        bias: [out], added in fp32.

    Returns [..., out] in the dtype that `F.linear` would return: that of x, or autocast's.

    Raises:
        ValueError: x or the blocks are on another device, x is not floating point or has another last dimension.
    """
    _check(x, blocks, format)
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    rows = x.detach().reshape(-1, x.shape[-1]).to(torch.float32).contiguous()
    result = torch.empty(len(rows), len(blocks), dtype=torch.float32, device="cpu")
    native.multiply_int8(
        format.name,
        lent_array(blocks.detach().contiguous()),
        rows.numpy(),
        threads=torch.get_num_threads(),
        out=result.numpy(),
    )
    if bias is not None:
        result += bias.detach()
    return result.to(dtype).reshape(*x.shape[:-1], len(blocks))


def _check(x: torch.Tensor, blocks: torch.Tensor, format: BlockFormat) -> None:
    for subject, device in (("input", x.device), ("weight", blocks.device)):
        if device.type != "cpu":
            raise ValueError(f"int8 activations are computed on the CPU only, and the {subject} is on {device}")
    if not x.is_floating_point():
        raise ValueError(f"a linear layer takes floating point, not {x.dtype}")
    columns = format.columns(blocks.shape[1])
    if x.ndim == 0 or x.shape[-1] != columns:
        raise ValueError(f"input has shape {list(x.shape)}; expected [..., {columns}]")
