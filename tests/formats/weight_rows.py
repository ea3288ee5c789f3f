"""Rows of weights of many kinds, and their blocks by the native core and by gguf."""

from __future__ import annotations

from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch

from quantlab import native
from quantlab.formats import FORMATS

OWN_SCALES = {name: row for name, row in FORMATS.items() if row.scale_of == "block"}
every_format = pytest.mark.parametrize("format", OWN_SCALES.values(), ids=OWN_SCALES)
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
every_device = pytest.mark.parametrize("device", DEVICES)


def native_blocks(weights: np.ndarray, format) -> np.ndarray:
    return native.quantize(format.name, weights, format.levels)


def gguf_blocks(weights: np.ndarray, format) -> np.ndarray:
    with np.errstate(all="ignore"):  # numpy warns of its own overflows
        return gguf.quants.quantize(weights, gguf.GGMLQuantizationType(format.ggml_type))


def gguf_weights(blocks: np.ndarray, format) -> np.ndarray:
    return gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType(format.ggml_type))


def gaussian(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(0, 0.02, (40, 256)).astype(np.float32)


def heavy_tailed(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_t(2, (40, 256)).astype(np.float32)


def float_denormal(rng: np.random.Generator) -> np.ndarray:
    """Weights around the smallest floats, whose scales are so small that their reciprocal is beyond fp32."""
    rows = rng.standard_normal((40, 256)) * 2.0 ** rng.integers(-149, -120, (40, 1))
    rows[:, ::7] = 0  # zero times infinity
    return rows.astype(np.float32)


REDUCED = [
    replace(format, levels=levels)
    for format in OWN_SCALES.values()
    for levels in (3, 4, 7, 8, 15, 31, 127)
    if levels < format.levels
]
reduced_formats = pytest.mark.parametrize("format", REDUCED, ids=lambda format: f"{format.name}-{format.levels}")
