"""Low-rank updates of weights, `scale * (b @ a)`, alone and put into blocks: numpy in, numpy out.

`a` is float32 [rank, columns], `b` float32 [rows, rank]; a rank of 0 is an update of zero. An update has one
arithmetic, for training and for what is written: in fp32, products are rounded and then added in ascending order over
the rank, beginning at zero, and the sum is multiplied by `scale` rounded to fp32; nothing is fused. In numpy or torch,
on any device, that is

    total = zeros([rows, columns])
    for k in range(rank):
        total = total + b[:, k : k + 1] * a[k]
    total * float32(scale)

Arrays are C-contiguous. Bits do not depend on the number of threads or on the processor; see the package for
QUANTLAB_CPU_KERNEL. Other Python threads run meanwhile.

Every function raises ValueError for an unknown format, shapes that do not belong together, a scale that is not finite
in fp32 or an update that is not, named by row and column, and TypeError for arrays of another type, number of
dimensions or memory layout, or an `out` that is read-only. `out` is written only after everything has been checked.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

import quantlab.native._core as _core
from quantlab.native import Blocks, cpu_kernel, default_threads

Floats = npt.NDArray[np.float32]
Halves = npt.NDArray[np.float16]

_WITH_MINIMUM = ("q4_1", "q5_1")
_BLOCK_COLUMNS = 32


def low_rank_product(
    a: Floats, b: Floats, scale: float, *, threads: int | None = None, out: Floats | None = None
) -> Floats:
    """`scale * (b @ a)` as float32 [rows, columns], any number of columns; `out` if given."""
    cpu_kernel()
    if out is None:
        out = np.empty((_extent(b, 0), _extent(a, 1)), np.float32)
    _core.low_rank_product(a, b, scale, _threads(threads), out)
    return out


def rechoose_codes(
    format: str,
    blocks: Blocks,
    a: Floats,
    b: Floats,
    scale: float,
    *,
    levels: int | None = None,
    threads: int | None = None,
    out: Blocks | None = None,
) -> Blocks:
    """Add an update to weights in blocks by choosing new codes; every block keeps its scale d and its minimum m.

    A code moves to the nearest to `code + update / d`, which is the nearest to the updated weight, all in exact
    arithmetic; where two are equally near, to the one nearer to where it was. So an update of zero gives back the
    bytes, whatever made them. Blocks whose d is zero, or whose d or m is NaN or infinite, stay as they are. No more
    than a tile of the update exists at a time.

    Args:
        blocks: uint8 [rows, row bytes] of [rows, columns] weights in one of the formats that `native.quantize` lists.
        levels: the codes to use, as `native.quantize` has them, by default all of the format's (q8_0: -127 to 127). A
            code that is beyond them already may stay where it is or move towards them.
        out: uint8 [rows, row bytes] to write to; may be `blocks` itself.

    Returns uint8 [rows, row bytes], which is `out` if that was given.
    """
    cpu_kernel()
    if out is None:
        out = np.empty_like(blocks) if isinstance(blocks, np.ndarray) else np.empty((0, 0), np.uint8)
    _core.rechoose_codes(format, levels, blocks, a, b, scale, _threads(threads), out)
    return out


def shift_minimums(
    format: str,
    blocks: Blocks,
    a: Floats,
    b: Floats,
    scale: float,
    *,
    threads: int | None = None,
    out: Blocks | None = None,
) -> Blocks:
    """Add an update that is constant within each block to the minima m: all weights of a block move alike.

    m becomes `float16(float32(m) + update)`, to nearest with ties to even; scales and codes stay. An m whose update is
    zero, or which is NaN or infinite, keeps its bits.

    Args:
        format: "q4_1" or "q5_1".
        blocks: uint8 [rows, row bytes].
        a: float32 [rank, blocks a row].
        out: uint8 [rows, row bytes] to write to; may be `blocks` itself.

    Returns uint8 [rows, row bytes], which is `out` if that was given.

    Raises:
        ValueError: besides, another format, or an m beyond half precision, named by row and block.
    """
    old = minimums(format, blocks)
    update = low_rank_product(a, b, scale, threads=threads)
    if update.shape != old.shape:
        raise ValueError(f"the update has shape {list(update.shape)}; expected {list(old.shape)}, one of each block")
    wide = old.astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        shifted = (wide + update).astype(np.float16)
    beyond = np.isinf(shifted) & np.isfinite(old)
    if beyond.any():
        row, block = np.unravel_index(int(beyond.argmax()), beyond.shape)
        raise ValueError(
            f"the minimum of block {block} of row {row} would be {wide[row, block] + update[row, block]:g}, "
            "beyond half precision"
        )
    return with_minimums(format, blocks, np.where((update == 0) | ~np.isfinite(old), old, shifted), out=out)


def minimums(format: str, blocks: Blocks) -> Halves:
    """The minima m of q4_1 or q5_1 blocks, a copy of their bytes: float16 [rows, blocks a row]."""
    return _halves(format, blocks)[..., 1].copy()


def with_minimums(format: str, blocks: Blocks, values: Halves, *, out: Blocks | None = None) -> Blocks:
    """The blocks with these minima, float16 [rows, blocks a row], byte for byte: what `minimums` returned undoes.

    Returns uint8 [rows, row bytes]: a copy, or `out` if that was given, which may be `blocks` itself.
    """
    expected = _halves(format, blocks).shape[:2]
    if not isinstance(values, np.ndarray) or values.dtype != np.float16:
        raise TypeError(f"values: expected an array of float16 [rows, blocks a row], got {_found(values)}")
    if values.shape != expected:
        raise ValueError(f"values has shape {list(values.shape)}; expected {list(expected)}, one of each block")
    if out is None:
        out = blocks.copy()
    else:
        _check_blocks("out", out)
        if out.shape != blocks.shape:
            raise ValueError(f"out has shape {list(out.shape)}; expected {list(blocks.shape)}")
        if not out.flags.writeable:
            raise TypeError(f"out: expected a writable array of uint8 [rows, row bytes], got {_found(out)}, read-only")
        if out is not blocks:
            out[...] = blocks
    _halves(format, out)[..., 1] = values
    return out


def _halves(format: str, blocks: Blocks) -> Halves:
    """The half-precision numbers that each block starts with, a view: [rows, blocks a row, 2]."""
    block_bytes = _core.row_bytes(format, _BLOCK_COLUMNS)  # refuses formats that do not exist
    if format not in _WITH_MINIMUM:
        raise ValueError(f"{format} blocks have no minimum; expected one of {', '.join(_WITH_MINIMUM)}")
    _check_blocks("blocks", blocks)
    _core.columns(format, blocks.shape[1])  # refuses rows that are not whole blocks
    by_block = blocks.reshape(len(blocks), blocks.shape[1] // block_bytes, block_bytes)
    return by_block[..., :4].view(np.float16)


def _check_blocks(name: str, blocks: Any) -> None:
    is_matrix = isinstance(blocks, np.ndarray) and blocks.ndim == 2
    if not is_matrix or blocks.dtype != np.uint8 or not blocks.flags.c_contiguous:
        raise TypeError(f"{name}: expected a C-contiguous array of uint8 [rows, row bytes], got {_found(blocks)}")


def _found(given: Any) -> str:
    return f"{given.dtype} {list(given.shape)}" if isinstance(given, np.ndarray) else type(given).__name__


def _extent(array: Any, axis: int) -> int:
    """0 for what is no matrix: the core says what is wrong with it."""
    return int(array.shape[axis]) if isinstance(array, np.ndarray) and array.ndim == 2 else 0


def _threads(threads: int | None) -> int:
    return default_threads() if threads is None else threads
