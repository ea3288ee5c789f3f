"""Round to nearest straight from a checkpoint's bytes to blocks: no torch, and of the floats a part at a time.

A format with one scale a tensor needs that scale first: such a tensor is read twice.
"""

from __future__ import annotations

import numpy as np

from quantlab.checkpoint import Checkpoint
from quantlab.checkpoint.tensors import to_fp32
from quantlab.formats import BlockFormat
from quantlab.formats.packing import TensorScale, pack_rows
from quantlab.native import relative_error


def round_stored(
    checkpoint: Checkpoint, name: str, format: BlockFormat, threads: int | None = None
) -> tuple[np.ndarray, float]:
    """Round a float tensor of a checkpoint to nearest, each block between its own minimum and maximum, or all by the
    tensor's scale.

    Returns:
        Blocks, uint8 [rows, row_bytes], and the relative error: the Frobenius norm of the rounding error over that of
        the weights.

    Raises:
        InputError: a weight is NaN or infinite, or a scale overflows fp16.
    """
    entry, where = checkpoint.entry(name), f"{checkpoint.path}: {name}"
    rows, columns = entry.shape
    blocks, sums = np.empty((rows, format.row_bytes(columns)), np.uint8), np.empty((rows, 2))
    element = "f32" if entry.dtype == "F64" else entry.dtype.lower()
    scale = None
    if format.scale_of == "tensor":
        whole = TensorScale(format, where, element=element, threads=threads)
        for _, part in checkpoint.read_rows(name):
            whole.add(_packable(part, entry.dtype))
        scale = whole.value()
    for start, part in checkpoint.read_rows(name):
        rows_here = slice(start, start + len(part))
        packed = pack_rows(
            _packable(part, entry.dtype),
            format,
            where,
            element=element,
            first_row=start,
            threads=threads,
            scale=scale,
            out=blocks[rows_here],
        )
        sums[rows_here] = packed.sums
    return blocks, relative_error(sums)


def _packable(part: np.ndarray, dtype: str) -> np.ndarray:
    """Rows as the core takes them, uint8 [rows, bytes a row]: doubles become fp32."""
    if dtype != "F64":
        return part
    return to_fp32(part.reshape(-1), dtype).reshape(len(part), -1).view(np.uint8)
