"""Rows are packed straight from a file's bytes, without torch; errors name the tensor and the place in it."""

from __future__ import annotations

import subprocess
import sys

import gguf
import numpy as np
import pytest

from quantlab import native
from quantlab.errors import InputError
from quantlab.formats import FORMATS
from quantlab.formats.packing import pack_rows

OWN_SCALES = {name: row for name, row in FORMATS.items() if row.scale_of == "block"}
every_format = pytest.mark.parametrize("format", OWN_SCALES.values(), ids=OWN_SCALES)


def stored(weights: np.ndarray, element: str) -> np.ndarray:
    """The bytes a file holds for these float32 weights, one row each; bfloat16 by cutting off."""
    if element == "bf16":
        return (weights.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    return weights.astype({"f32": np.float32, "f16": np.float16}[element]).view(np.uint8)


def small_integers() -> np.ndarray:
    """Exact in every element type."""
    return np.random.default_rng(0).integers(-100, 101, (11, 96)).astype(np.float32)


@every_format
@pytest.mark.parametrize("element", ["f32", "f16", "bf16"])
def test_a_files_bytes_are_packed_some_rows_at_a_time(format, element):
    weights = small_integers()
    raw = stored(weights, element)
    blocks = np.zeros((11, format.row_bytes(96)), np.uint8)
    sums = [
        pack_rows(raw[i : i + 4], format, "w", element=element, first_row=i, out=blocks[i : i + 4]).sums
        for i in range(0, 11, 4)
    ]
    expected = gguf.quants.quantize(weights, gguf.GGMLQuantizationType(format.ggml_type))
    np.testing.assert_array_equal(blocks, expected)
    assert native.relative_error(np.concatenate(sums)) == pack_rows(weights, format, "w").relative_error


@pytest.mark.parametrize("element", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named_by_its_place_in_the_tensor(element, value):
    weights = small_integers()
    weights[2, 70] = value
    message = f"^layer.weight: row 9, column 70 is {value}; the checkpoint is damaged$"
    with pytest.raises(InputError, match=message):
        pack_rows(stored(weights, element), FORMATS["q4_0"], "layer.weight", element=element, first_row=7)


@pytest.mark.parametrize("element", ["f32", "bf16"])
def test_a_scale_that_overflows_is_named_by_its_place_in_the_tensor(element):
    weights = small_integers()
    weights[2, 70] = -(2.0**30)
    with pytest.raises(InputError) as error:
        pack_rows(stored(weights, element), FORMATS["q8_0"], "layer.weight", element=element, first_row=7)
    assert str(error.value) == (
        "layer.weight: row 9, columns 64 to 95: the q8_0 scale overflows fp16 (weights reach 1.07374e+09); "
        "leave this tensor unquantized"
    )


def test_a_halves_minimum_never_overflows_but_its_neighbours_do():
    """numpy's own types need no word for what they are."""
    largest = np.full((1, 32), -65504, np.float16)
    assert pack_rows(largest, FORMATS["q4_1"], "w").relative_error == 0
    with pytest.raises(InputError, match="w: row 0, columns 0 to 31: the q4_1 scale overflows fp16"):
        pack_rows(largest.astype(np.float32) * 2, FORMATS["q4_1"], "w")


def test_fewer_levels_are_the_formats_to_choose():
    from dataclasses import replace

    packed = pack_rows(small_integers(), replace(FORMATS["q4_1"], levels=5), "w", measure=False)
    np.testing.assert_array_equal(packed.blocks, native.quantize("q4_1", small_integers(), 5))
    assert packed.sums is None


def test_packing_loads_no_torch():
    probe = "import sys, quantlab.formats.packing, quantlab.quantization.rtn; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], timeout=60).returncode == 0
