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
    scale: float | None = None,
    out: npt.NDArray[np.uint8] | None = None,
) -> native.Quantized:
    """Round rows of weights to the nearest codes, as `BlockFormat.quantize` does, and measure the error on the way.

    Args:
        weights: C-contiguous [rows, columns] of float32 or float16, or uint8 [rows, bytes a row] of any `element`,
            such as a part of a mapped file; columns a multiple of the format's block size.
        name: what errors call the tensor.
        element: "f32", "f16" or "bf16" (a file's element type, in lower case).
        first_row: the place of the first of these rows in their tensor, for errors.
        measure: sum the squares of errors and weights (`native.relative_error` of all rows' sums).
        threads: the most to use, by default one a core.
        scale: of formats with one a tensor: the whole tensor's (`TensorScale`); without one the rows are all of it.
        out: uint8 [rows, format.row_bytes(columns)] to write to.

    Raises:
        InputError: a weight is NaN or infinite, or a scale overflows fp16; `out` is written all the same.
        ValueError, TypeError: as `native.quantize`.
    """
    if format.scale_of == "tensor":
        packed = native.quantize_ternary(weights, scale, element=element, measure=measure, threads=threads, out=out)
    else:
        packed = native.quantize_checked(
            format.name, weights, format.levels, element=element, measure=measure, threads=threads, out=out
        )
    if packed.not_finite is not None:
        raise _not_finite(name, weights, element, packed.not_finite, first_row)
    if packed.overflow is not None and format.scale_of == "tensor":
        raise tensor_scale_overflow(format, name)
    if packed.overflow is not None:
        row, block = packed.overflow
        start, stop = format.block_size * block, format.block_size * (block + 1)
        largest = float(np.abs(_as_float32(weights[row], element)[start:stop]).max())
        raise scale_overflow(format, name, first_row + row, block, largest)
    return packed


class TensorScale:
    """The one scale of a tensor that is read some rows at a time (`formats.ternary` has its definition).

    Memory grows by eight bytes for each block.

    Args:
        format: one with `scale_of == "tensor"`.
        name: what errors call the tensor.
        element: as `pack_rows` has it.
    """

    def __init__(
        self, format: BlockFormat, name: str, *, element: str | None = None, threads: int | None = None
    ) -> None:
        self._format, self._name, self._element, self._threads = format, name, element, threads
        self._sums: list[npt.NDArray[np.float64]] = []
        self._rows = 0

    def add(self, weights: npt.NDArray[Any]) -> None:
        """Take up the next rows.

        Raises:
            InputError: a weight is NaN or infinite.
        """
        sums = native.magnitude_sums(weights, element=self._element, threads=self._threads)
        if not np.isfinite(sums).all():
            row = int(np.flatnonzero(~np.isfinite(sums).all(axis=1))[0])
            column = int(np.flatnonzero(~np.isfinite(_as_float32(weights[row], self._element)))[0])
            raise _not_finite(self._name, weights, self._element, (row, column), self._rows)
        self._sums.append(sums)
        self._rows += len(weights)

    def value(self) -> float:
        """The scale, an fp16 number.

        Raises:
            InputError: it is beyond fp16.
        """
        scale = native.ternary_scale(np.concatenate(self._sums))
        if scale == float("inf"):
            raise tensor_scale_overflow(self._format, self._name)
        return scale


def tensor_scale_overflow(format: BlockFormat, name: str) -> InputError:
    """The error for a tensor whose one scale is beyond fp16."""
    return InputError(
        f"{name}: the {format.name} scale, the mean magnitude of its weights, overflows fp16; "
        "leave this tensor unquantized"
    )


def _not_finite(
    name: str, weights: npt.NDArray[Any], element: str | None, place: tuple[int, int], first_row: int
) -> InputError:
    row, column = place
    value = float(_as_float32(weights[row], element)[column])
    return InputError(f"{name}: row {first_row + row}, column {column} is {value}; the checkpoint is damaged")


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
