"""Weights in memory or straight from a file to blocks, without torch; what is wrong with them is said in one line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from quantlab import native
from quantlab.errors import InputError

if TYPE_CHECKING:
    from quantlab.formats.blocks import BlockFormat


def pack_rows(
    weights: npt.NDArray[Any],
    format: BlockFormat,
    name: str,
    *,
    element: str | None = None,
    first_row: int = 0,
    measure: bool = True,
    threads: int | None = None,
    out: npt.NDArray[np.uint8] | None = None,
) -> native.Quantized:
    """Round rows of weights to the nearest codes, as `BlockFormat.quantize` does, and measure the error on the way.

    Args:
        weights: C-contiguous [rows, columns] of float32 or float16, or uint8 [rows, bytes a row] of any `element`,
            such as a part of a mapped file; columns a multiple of 32.
        name: what errors call the tensor.
        element: "f32", "f16" or "bf16" (a file's element type, in lower case).
        first_row: the place of the first of these rows in their tensor, for errors.
        measure: sum the squares of errors and weights (`native.relative_error` of all rows' sums).
        threads: the most to use, by default one a core.
        out: uint8 [rows, format.row_bytes(columns)] to write to.

    Raises:
        InputError: a weight is NaN or infinite, or a scale overflows fp16; `out` is written all the same.
        ValueError, TypeError: as `native.quantize`.
    """
    packed = native.quantize_checked(
        format.name, weights, format.levels, element=element, measure=measure, threads=threads, out=out
    )
    if packed.not_finite is not None:
        row, column = packed.not_finite
        value = float(_as_float32(weights[row], element)[column])
        raise InputError(f"{name}: row {first_row + row}, column {column} is {value}; the checkpoint is damaged")
    if packed.overflow is not None:
        row, block = packed.overflow
        start, stop = format.block_size * block, format.block_size * (block + 1)
        largest = float(np.abs(_as_float32(weights[row], element)[start:stop]).max())
        raise scale_overflow(format, name, first_row + row, block, largest)
    return packed


def scale_overflow(format: BlockFormat, name: str, row: int, block: int, largest: float) -> InputError:
    """The error for a block whose scale or minimum is beyond fp16; `largest` is its weights' largest magnitude."""
    columns = f"columns {format.block_size * block} to {format.block_size * (block + 1) - 1}"
    return InputError(
        f"{name}: row {row}, {columns}: the {format.name} scale overflows fp16 (weights reach {largest:g}); "
        "leave this tensor unquantized"
    )


def _as_float32(row: npt.NDArray[Any], element: str | None) -> npt.NDArray[np.float32]:
    if element == "bf16":
        return (row.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    types = {"f32": np.float32, "f16": np.float16}
    return row.view(types[element] if element is not None else row.dtype).astype(np.float32)
