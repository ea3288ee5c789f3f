"""Quantize and dequantize weights in ggml's block formats: numpy in, numpy out, compiled C++ between.

These are its five legacy formats, whose blocks have scales of their own, and tq2_0, ternary with one scale a tensor.

Weights are float32 ("f32"), half precision ("f16") or bfloat16 ("bf16"), which numpy has no type for: an array may
also hold the raw bytes of its rows, uint8 [rows, columns * bytes of one], or their bits as unsigned integers, with
`element` saying what they are. Arrays are two-dimensional and C-contiguous, at any address; nothing is copied
silently. Bytes do not depend on the number of threads or on the processor.

The environment variable QUANTLAB_CPU_KERNEL chooses the instruction set, `scalar`, `avx2` or `avx512`, for tests and
timing; `cpu_kernel` tells which is in use. A value that is unknown, or that the processor cannot run, raises
InputError.
"""

from __future__ import annotations

import math
import os
import threading
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

import quantlab.native._core as _core
from quantlab.native._core import (
    Decoder,
    DecoderAdapters,
    DecoderSpec,
    DecoderWeights,
    PackedMatrix,
    Sampler,
    read_bandwidth,
)

__all__ = [
    "Decoder",
    "DecoderAdapters",
    "DecoderSpec",
    "DecoderWeights",
    "PackedMatrix",
    "Quantized",
    "Sampler",
    "cpu_kernel",
    "default_threads",
    "dequantize",
    "magnitude_sums",
    "multiply_int8",
    "quantize",
    "quantize_checked",
    "quantize_ternary",
    "read_bandwidth",
    "relative_error",
    "ternary_scale",
]

Blocks = npt.NDArray[np.uint8]
Array = npt.NDArray[Any]

# The numpy type of one element; bfloat16's stands for its bits.
_ELEMENT_TYPES: dict[str, np.dtype[Any]] = {
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(np.uint16),
}


class Quantized(NamedTuple):
    """Blocks, and what was found on the way to them.

    `sums` is float64 [rows, 2], or None where nothing was measured: of each row the sum of the squares of the rounding
    errors (in fp32: decoded less original weight) and the sum of the squares of the weights. A row's sums depend on
    nothing but the row.

    `not_finite` is (row, column) of the first weight that is NaN or infinite, `overflow` (row, block) of the first
    block whose scale or minimum is beyond half precision though its weights are finite; None if there is none.

    `scale` is the tensor's, where it has one.
    """

    blocks: Blocks
    sums: npt.NDArray[np.float64] | None
    not_finite: tuple[int, int] | None
    overflow: tuple[int, int] | None
    scale: float | None = None

    @property
    def relative_error(self) -> float:
        """Frobenius norm of the rounding error over that of the weights; 0 for weights that are all zero."""
        if self.sums is None:
            raise ValueError("the rounding error was not measured")
        return relative_error(self.sums)


def quantize(
    format: str,
    weights: Array,
    levels: int,
    *,
    element: str | None = None,
    threads: int | None = None,
    out: Blocks | None = None,
) -> Blocks:
    """Encode each row's runs of 32 weights as blocks, scaled by their extremes, each weight to the nearest code.

    The formats are ggml's (https://github.com/ggml-org/ggml), and at their own number of levels, the largest given
    here, the bytes are those of its Python package `gguf`:

    ======  ===========  ======  ======================================
    format  block bytes  levels  a weight, from its code
    ======  ===========  ======  ======================================
    q4_0    18           2..16   scale * (code - 8)
    q4_1    20           2..16   scale * code + minimum
    q5_0    22           2..32   scale * (code - 16)
    q5_1    24           2..32   scale * code + minimum
    q8_0    34           3..255  scale * code, code from -127 to 127
    ======  ===========  ======  ======================================

    Args:
        weights: [rows, columns], columns a multiple of 32. A block with a weight that is NaN or infinite becomes zeros
            with scale NaN.
        levels: how many codes to use; fewer than the format's own give coarser weights in the same blocks (q8_0 has
            as many codes below zero as above: an even number uses one less).
        element: "f32", "f16" or "bf16"; may be left out for weights of numpy's float32 and float16.
        threads: the most to use, by default `default_threads()`; small matrices take one.
        out: uint8 [rows, row bytes] to write to.

    Returns uint8 [rows, columns / 32 * block bytes], which is `out` if that was given. Scales and minima are stored in
    half precision: from 65520 on they become infinite, up to 2**-25 zero.

    Raises:
        ValueError: an unknown format or element, or tq2_0 (see `quantize_ternary`), columns that are not whole blocks,
            levels or threads out of range, an `out` of another shape.
        TypeError: an array of another type, number of dimensions or memory layout, or an `out` that is read-only.

    Other Python threads run meanwhile.
    """
    return quantize_checked(format, weights, levels, element=element, measure=False, threads=threads, out=out).blocks


def quantize_checked(
    format: str,
    weights: Array,
    levels: int,
    *,
    element: str | None = None,
    measure: bool = True,
    threads: int | None = None,
    out: Blocks | None = None,
) -> Quantized:
    """`quantize`, and in the same pass the first fault of weights and scales and, if `measure`, the rounding error."""
    raw, element = _raw_weights(weights, element)
    rows, width = raw.shape
    row_bytes = _core.row_bytes(format, width // _ELEMENT_TYPES[element].itemsize)
    blocks = np.empty((rows, row_bytes), np.uint8) if out is None else out
    sums = np.empty((rows, 2)) if measure else None
    not_finite, overflow = _core.quantize(format, element, raw, levels, _threads(threads), blocks, sums)
    return Quantized(blocks, sums, not_finite, overflow)


def quantize_ternary(
    weights: Array,
    scale: float | None = None,
    *,
    element: str | None = None,
    measure: bool = True,
    threads: int | None = None,
    out: Blocks | None = None,
) -> Quantized:
    """Encode a whole tensor as tq2_0: each run of 256 weights of a row a block of 66 bytes, w = scale * (code - 1).

    The scale is the mean magnitude of all weights, rounded to fp32 and then to fp16; a weight whose magnitude is at
    most half of the scale and 1e-5 becomes 0, others the scale with their sign (BitNet b1.58, arXiv 2402.17764). Blocks
    of zeros store a scale of 0, so that the bytes are those that `gguf` writes for the rounded weights.

    Args:
        weights: [rows, columns], columns a multiple of 256.
        scale: the whole tensor's, where `weights` are a part of it (`ternary_scale`); what is not finite is not looked
            for then.
        element, threads, out: as in `quantize`.
        measure: sum the squares of errors and weights.

    Returns blocks, uint8 [rows, columns / 256 * 66], with the scale; of weights that are not finite, or whose mean is
    beyond half precision (`overflow` is the first block then), every block is zeros with scale NaN.

    Raises:
        ValueError: an unknown element, columns that are not whole blocks, a scale that is no number of half precision
            or negative, threads out of range, an `out` of another shape.
        TypeError: as `quantize`.

    Other Python threads run meanwhile.
    """
    raw, element = _raw_weights(weights, element)
    rows, width = raw.shape
    row_bytes = _core.row_bytes("tq2_0", width // _ELEMENT_TYPES[element].itemsize)
    blocks = np.empty((rows, row_bytes), np.uint8) if out is None else out
    sums = np.empty((rows, 2)) if measure else None
    used, not_finite = _core.quantize_ternary(element, raw, scale, _threads(threads), blocks, sums)
    overflow = (0, 0) if not_finite is None and math.isinf(used) else None
    return Quantized(blocks, sums, not_finite, overflow, used)


def magnitude_sums(
    weights: Array, *, element: str | None = None, threads: int | None = None
) -> npt.NDArray[np.float64]:
    """The sums of the magnitudes of each run of 256 weights of a row, float64 [rows, columns / 256].

    They do not depend on threads or processor; a run with a weight that is NaN or infinite has one that is, too.

    Raises:
        ValueError, TypeError: as `quantize_ternary`.
    """
    raw, element = _raw_weights(weights, element)
    blocks = _core.row_bytes("tq2_0", raw.shape[1] // _ELEMENT_TYPES[element].itemsize) // _core.row_bytes("tq2_0", 256)
    sums = np.empty((len(raw), blocks))
    _core.sum_magnitudes(element, raw, _threads(threads), sums)
    return sums


def ternary_scale(sums: npt.NDArray[np.float64]) -> float:
    """The scale of a tensor whose runs of 256 weights have these `magnitude_sums` [rows, columns / 256]: a number of
    half precision, or infinity where it is beyond that; NaN if a sum is.
    """
    return _core.ternary_scale(sums)


def dequantize(
    format: str,
    blocks: Blocks,
    *,
    element: str = "f32",
    threads: int | None = None,
    out: Array | None = None,
) -> Array:
    """Decode blocks to the weights they stand for, bit for bit as ggml's Python package `gguf` does.

    Args:
        format: one of those `quantize` lists, or "tq2_0".
        blocks: uint8 [rows, row bytes], row bytes a multiple of the format's block bytes.
        element: what to round the fp32 weights to, to nearest with ties to even.
        threads: the most to use, by default `default_threads()`; small matrices take one.
        out: an array of the result's shape and type to write to, or uint8 [rows, its bytes a row].

    Returns [rows, row bytes / block bytes * weights of a block] of float32, float16, or for "bf16" uint16 bits; `out`
    if given.

    Raises:
        ValueError: an unknown format or element, rows that are not whole blocks, an `out` of another shape.
        TypeError: an array of another type, number of dimensions or memory layout, or an `out` that is read-only.

    Other Python threads run meanwhile.
    """
    if out is None:
        is_matrix = isinstance(blocks, np.ndarray) and blocks.ndim == 2
        rows, row_bytes = blocks.shape if is_matrix else (0, 0)  # the core says what is wrong
        out = np.empty((rows, _core.columns(format, row_bytes)), _element_type(element))
    raw, element = _raw_weights(out, element)
    _core.dequantize(format, element, blocks, _threads(threads), raw)
    return out


def multiply_int8(
    format: str,
    blocks: Blocks,
    values: npt.NDArray[np.float32],
    *,
    threads: int | None = None,
    out: npt.NDArray[np.float32] | None = None,
) -> npt.NDArray[np.float32]:
    """Multiply activations by packed rows, the activations rounded to int8 on the way: `values @ weights.T`.

    Each run of 32 activations, or for tq2_0 each token, is rounded to whole multiples of its largest magnitude / 127,
    ties to even; products of a block are added exactly, blocks in fp32 in ascending order. The result is the engine's,
    bit for bit, whatever the number of threads and of rows of `values`. The blocks are read where they lie: besides
    `out` a call needs 1.25 bytes an activation and some 128 KiB a thread.

    Args:
        format: one of those `quantize` lists, or "tq2_0".
        blocks: uint8 [rows, row bytes], row bytes a multiple of the format's block bytes.
        values: float32 [tokens, columns]. A token with one that is NaN or infinite has outputs NaN.
        threads: the most to use, by default `default_threads()`; small products take one.
        out: float32 [tokens, rows] to write to.

    Returns float32 [tokens, rows]; `out` if given.

    Raises:
        ValueError: an unknown format, rows that are not whole blocks, values or an `out` of another shape, threads
            out of range.
        TypeError: an array of another type, number of dimensions or memory layout, or an `out` that is read-only.
        InputError: as `cpu_kernel`.

    Other Python threads run meanwhile; those that multiply on several threads take turns.
    """
    cpu_kernel()
    tokens, rows = _row_count(values), _row_count(blocks)
    if out is None:
        out = np.empty((tokens, rows), np.float32)
    work = np.size(blocks) * (4 + tokens)  # taking a byte's weights from their rows costs as much as four tokens
    wanted = _threads(threads)
    pool = _pool(wanted) if wanted != 1 and work > _LEAST_SHARED_WORK else _own_pool(wanted)
    _core.multiply_file_rows(pool, format, blocks, values, out)
    return out


_LEAST_SHARED_WORK = 1 << 19  # some 50 microseconds: waking another thread takes as long


class _OwnPool(threading.local):
    """Each Python thread's own, of itself alone."""

    def __init__(self) -> None:
        self.pool = _core.ThreadPool(1)


_own = _OwnPool()


def _own_pool(wanted: int) -> _core.ThreadPool:
    return _own.pool if wanted >= 1 else _pool(wanted)  # which says what is wrong


@lru_cache(maxsize=2)  # of as many as the process uses
def _pool(threads: int) -> _core.ThreadPool:
    """Threads that sleep between calls; a forked child starts its own."""
    return _core.ThreadPool(threads)


def _row_count(array: Array) -> int:
    """0 for what is no matrix: the core says what is wrong with it."""
    return len(array) if isinstance(array, np.ndarray) and array.ndim == 2 else 0


def relative_error(sums: npt.NDArray[np.float64]) -> float:
    """Frobenius norm of the rounding error over that of the weights, from `Quantized.sums` of all rows.

    The rows' sums are added with one rounding at the end, so that it does not matter in how many calls they were made.
    """
    error, total = (math.fsum(column) for column in sums.T.tolist())
    return math.sqrt(error / total) if total else 0.0


def cpu_kernel() -> str:
    """The kernel in use: "scalar", "avx2" or "avx512" (whose conversions are those of avx2).

    Raises:
        InputError: QUANTLAB_CPU_KERNEL names none, or one that cannot run here.
    """
    return _core.cpu_kernel()


def default_threads() -> int:
    """One thread for each core that this process may run on; the hyper-threads of a core count once."""
    return _cores(frozenset(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def _cores(processors: frozenset[int]) -> int:
    """The number of cores that those processors are; where the system does not tell, each counts."""
    system = Path("/sys/devices/system/cpu")
    try:
        cores = {(system / f"cpu{i}" / "topology" / "thread_siblings_list").read_text() for i in processors}
    except OSError:
        return len(processors)
    return len(cores)


def _threads(threads: int | None) -> int:
    return default_threads() if threads is None else threads


def _element_type(element: str) -> np.dtype[Any]:
    if element not in _ELEMENT_TYPES:
        raise ValueError(f"unknown element type {element!r}; expected one of {', '.join(_ELEMENT_TYPES)}")
    return _ELEMENT_TYPES[element]


def _raw_weights(weights: Array, element: str | None) -> tuple[Blocks, str]:
    """The bytes of the rows, as a view, and the word for their element type."""
    if not isinstance(weights, np.ndarray):
        raise TypeError(f"weights must be a numpy array, not {type(weights).__name__}")
    dtype = weights.dtype
    if element is None:
        named = [word for word in ("f32", "f16") if dtype == _ELEMENT_TYPES[word]]
        if not named:
            raise TypeError(f"weights of type {dtype} need float32, float16, or `element` to say what their bits are")
        (element,) = named
    size = _element_type(element).itemsize
    if dtype not in (_ELEMENT_TYPES[element], np.dtype(f"u{size}"), np.dtype(np.uint8)):
        raise TypeError(f"weights of type {dtype} are not {element}, its bits or its bytes")
    if np.ndim(weights) != 2 or not weights.flags.c_contiguous:
        raise TypeError(f"weights of shape {list(np.shape(weights))} must be two-dimensional and C-contiguous")
    return weights.view(np.uint8), element
