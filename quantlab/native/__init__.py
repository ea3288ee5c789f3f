"""Quantize and dequantize weights in ggml's five legacy block formats: numpy in, numpy out, compiled C++ between."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from quantlab.native._core import dequantize as _dequantize
from quantlab.native._core import quantize as _quantize

__all__ = ["dequantize", "quantize"]


def quantize(format: str, weights: npt.NDArray[np.float32], levels: int) -> npt.NDArray[np.uint8]:
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

    `weights` is float32 [rows, columns], C-contiguous, with columns a multiple of 32. Weights should be finite: what a
    block with another encodes to is not promised. `levels` is how many codes to use; fewer than the format's own give
    coarser weights in the same blocks (q8_0 has as many codes below zero as above: an even number uses one less).

    Returns uint8 [rows, columns / 32 * block bytes]. Scales and minima are stored in half precision: from 65520 on
    they become infinite, up to 2**-25 zero.

    Raises ValueError for an unknown format, columns that are not whole blocks and levels out of range, TypeError for
    weights of another type, number of dimensions or memory layout: nothing is copied silently.

    Other Python threads run meanwhile. Rows are independent, so slices of rows may be given to several threads.
    """
    return _quantize(format, weights, levels)


def dequantize(format: str, blocks: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Decode blocks to the weights they stand for, bit for bit as ggml's Python package `gguf` does.

    `format` is one of those `quantize` lists; `blocks` is uint8 [rows, row bytes], C-contiguous at any address, with
    row bytes a multiple of the format's block bytes.

    Returns float32 [rows, row bytes / block bytes * 32].

    Raises ValueError for an unknown format and rows that are not whole blocks, TypeError for blocks of another type,
    number of dimensions or memory layout: nothing is copied silently.

    Other Python threads run meanwhile.
    """
    return _dequantize(format, blocks)
