"""Round to nearest straight from a checkpoint's bytes to blocks: no torch, and of the floats a part at a time."""

from __future__ import annotations

import numpy as np

from quantlab.checkpoint import Checkpoint
from quantlab.checkpoint.tensors import to_fp32
from quantlab.formats import BlockFormat
from quantlab.formats.packing import pack_rows
from quantlab.native import relative_error


def round_stored(
    checkpoint: Checkpoint, name: str, format: BlockFormat, threads: int | None = None
) -> tuple[np.ndarray, float]:
    """Round a float tensor of a checkpoint to nearest, each block between its own minimum and maximum.

    Returns:
        Blocks, uint8 [rows, row_bytes], and the relative error: the Frobenius norm of the rounding error over that of
        the weights.

    Raises:
        InputError: a weight is NaN or infinite, or a scale overflows fp16.
    """
    entry, where = checkpoint.entry(name), f"{checkpoint.path}: {name}"
    rows, columns = entry.shape
    blocks, sums = np.empty((rows, format.row_bytes(columns)), np.uint8), np.empty((rows, 2))
    for start, part in checkpoint.read_rows(name):
        element, data = entry.dtype, part
        if element == "F64":
            element, data = "F32", to_fp32(part.reshape(-1), "F64").reshape(-1, columns).view(np.uint8)
        end = start + len(part)
        packed = pack_rows(
            data, format, where, element=element.lower(), first_row=start, threads=threads, out=blocks[start:end]
        )
        sums[start:end] = packed.sums
    return blocks, relative_error(sums)
