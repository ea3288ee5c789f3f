"""Multiplication of packed weights by activations rounded to int8: the native engine's arithmetic, for torch's CPU;
elsewhere by torch operations, for formats whose activations have one scale a token.
"""

from __future__ import annotations

import torch

from quantlab import native
from quantlab.formats import BlockFormat
from quantlab.formats.arithmetic import lent_array
from quantlab.nn.token_int8 import token_linear


def int8_linear(x: torch.Tensor, blocks: torch.Tensor, bias: torch.Tensor | None, format: BlockFormat) -> torch.Tensor:
    """`x W^T + b` with x rounded to int8, in runs of 32 or whole tokens as the format has it.

    On CPU that is `native.multiply_int8`, straight from the blocks.

    Args:
        x: floating point [..., in]; other types than fp32 go by way of it.
        blocks: uint8 [out, row_bytes] on the same device, on CPU unless the format's activations have a scale a token.
        bias: [out], added in fp32.

    Returns [..., out] in the dtype that `F.linear` would return: that of x, or autocast's.

    Raises:
        ValueError: x or the blocks are on another device, x is not floating point or has another last dimension.
    """
    _check(x, blocks, format)
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    if device != "cpu":
        return token_linear(x, blocks, bias, format, dtype)
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
        if device.type != "cpu" and format.activations == "block":
            raise ValueError(f"int8 activations are computed on the CPU only, and the {subject} is on {device}")
    if x.device != blocks.device:
        raise ValueError(f"the input is on {x.device}, and the weight on {blocks.device}")
    if not x.is_floating_point():
        raise ValueError(f"a linear layer takes floating point, not {x.dtype}")
    columns = format.columns(blocks.shape[1])
    if x.ndim == 0 or x.shape[-1] != columns:
        raise ValueError(f"input has shape {list(x.shape)}; expected [..., {columns}]")
