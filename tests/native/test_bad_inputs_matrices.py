"""Conversions and multiplications, given what they cannot use: a Python exception that names it, and nothing worse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import quantlab.native._core as _core
from bad_arguments import (
    FUZZ,
    anything,
    arrays,
    call,
    elements,
    every_other,
    formats,
    frozen,
    matrix,
    misaligned,
    whole,
)
from hypothesis import given
from hypothesis import strategies as st

from quantlab import native


def test_sizes_of_matrices():
    with pytest.raises(ValueError, match="unknown weight type 'q4'; expected one of f32, f16"):
        native.PackedMatrix("q4", 1, 32)
    for count in (0, -1, 2**62):
        with pytest.raises(ValueError, match=f"a matrix cannot have {count} rows; expected 1 to"):
            native.PackedMatrix("f32", count, 32)
        with pytest.raises(ValueError, match=f"a matrix cannot have {count} columns; expected 1 to"):
            native.PackedMatrix("f32", 1, count)
    with pytest.raises(MemoryError):
        native.PackedMatrix("f32", 2**30 - 1, 2**30 - 1)
    with pytest.raises(MemoryError):
        native.PackedMatrix("q4_0", 2**30 - 1, 2**30 - 32)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (misaligned, "address is no multiple of 4"),
        (every_other, "not contiguous"),
        (lambda array: array.astype(np.float64), "got float64"),
        (lambda array: array[0], r"got float32 \[\d+\]"),
        (lambda array: array.tolist(), "got list"),
    ],
)
def test_arrays_of_a_multiplication(spoil: Callable[[np.ndarray], Any], message):
    one, pool = matrix(16, 64), _core.ThreadPool(1)
    x, out = np.ones((2, 64), np.float32), np.zeros((2, 16), np.float32)
    codes, scales = np.ones((2, 64), np.int8), np.ones((2, 2), np.float32)
    packed = native.PackedMatrix("q8_0", 16, 64)
    with pytest.raises(TypeError, match=f"values: .*{message}"):
        one.multiply_values(pool, spoil(x), out, 0, 1)
    with pytest.raises(TypeError, match=f"out: .*{message}"):
        one.multiply_values(pool, x, spoil(out), 0, 1)
    with pytest.raises(TypeError, match=f"scales: .*{message}"):
        packed.multiply_codes(pool, codes, spoil(scales), scales, out, 0, 1)
    with pytest.raises(TypeError, match=f"sums: .*{message}"):
        packed.multiply_codes(pool, codes, scales, spoil(scales), out, 0, 1)
    with pytest.raises(TypeError, match=f"out: .*{message}"):
        one.read_row(0, spoil(out))
    with pytest.raises(TypeError, match=f"values: .*{message}"):
        _core.quantize_tokens(spoil(x), codes, scales, scales)
    wide = np.ones((2, 256), np.float32)
    with pytest.raises(TypeError, match=f"values: .*{message}"):
        _core.quantize_rows(spoil(wide), wide.astype(np.int8), scales[:, :1].copy(), scales[:, :1].copy())
    with pytest.raises(TypeError, match=r"rows: .*got float32"):
        one.fill(0, x)


@pytest.mark.parametrize(("first", "last"), [(-1, 1), (1, 0), (0, 2), (2, 2), (0, 2**31 - 1), (-(2**31), 2**31 - 1)])
def test_groups_out_of_range(first, last):
    one, pool = matrix(16, 64), _core.ThreadPool(1)
    with pytest.raises(ValueError, match=f"no groups {first} to {last} in a matrix of 1"):
        one.multiply_values(pool, np.ones((1, 64), np.float32), np.zeros((1, 16), np.float32), first, last)


@pytest.mark.parametrize("row", [-1, 16, 2**62])
def test_rows_out_of_range(row):
    one = matrix(16, 64)
    with pytest.raises(ValueError, match=f"no row {row} in a matrix of 16"):
        one.read_row(row, np.zeros((1, 64), np.float32))
    with pytest.raises(ValueError, match="in a matrix of 16"):
        one.fill(row, np.zeros((1, 256), np.uint8))


@pytest.mark.parametrize("threads", [0, -1, 1025, 2**31 - 1])
def test_threads_of_a_pool(threads):
    with pytest.raises(ValueError, match=f"cannot use {threads} threads; expected 1 to 1024"):
        _core.ThreadPool(threads)
    with pytest.raises(ValueError, match="threads"):
        native.read_bandwidth(1 << 20, threads, 1)


def file_rows(**changes: Any) -> dict[str, Any]:
    """Arguments for two tokens by three rows of two blocks, `changes` among them."""
    made = {"format": "q4_1", "blocks": np.zeros((3, 40), np.uint8), "values": np.zeros((2, 64), np.float32)}
    return {**made, "out": np.zeros((2, 3), np.float32), **changes}


def multiply_file_rows(arguments: dict[str, Any]) -> None:
    _core.multiply_file_rows(_core.ThreadPool(1), *arguments.values())


@pytest.mark.parametrize("name", ["values", "out"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (misaligned, "address is no multiple of 4"),
        (every_other, "not contiguous"),
        (lambda array: array.astype(np.float64), "got float64"),
        (lambda array: array[0], r"got float32 \[\d+\]"),
        (lambda array: array.tolist(), "got list"),
        (lambda _: None, "got NoneType"),
    ],
    ids=["misaligned", "strided", "float64", "one row", "list", "None"],
)
def test_arrays_of_file_rows(name, spoil: Callable[[np.ndarray], Any], message):
    good = file_rows()
    with pytest.raises(TypeError, match=f"^{name}: .*{message}"):
        multiply_file_rows(file_rows(**{name: spoil(good[name])}))
    if name == "values":
        with pytest.raises(TypeError, match=f"^{name}: .*{message}"):
            native.multiply_int8("q4_1", good["blocks"], spoil(good[name]))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"format": "q3_k"}, ValueError, "unknown block format 'q3_k'; expected one of q4_0, q4_1"),
        ({"format": None}, TypeError, "format: str"),
        ({"blocks": np.zeros((3, 39), np.uint8)}, ValueError, "blocks have 39 bytes a row; expected a multiple of 20"),
        ({"blocks": np.zeros((3, 0), np.uint8)}, ValueError, "blocks have 0 bytes a row"),
        ({"blocks": np.zeros((4, 40), np.uint8)}, ValueError, r"out has shape \[2, 3\]; expected \[2, 4\]"),
        ({"blocks": np.zeros((3, 40), np.int8)}, TypeError, r"^blocks: .*got int8 \[3, 40\]"),
        ({"blocks": np.zeros((40, 3), np.uint8).T}, TypeError, "^blocks: .*not contiguous"),
        ({"blocks": np.zeros(40, np.uint8)}, TypeError, r"^blocks: .*got uint8 \[40\]"),
        ({"blocks": None}, TypeError, "^blocks: .*got NoneType"),
        ({"values": np.zeros((2, 32), np.float32)}, ValueError, r"values has shape \[2, 32\]; expected \[2, 64\]"),
        ({"values": np.zeros((0, 64), np.float32)}, ValueError, r"out has shape \[2, 3\]; expected \[0, 3\]"),
        ({"out": frozen(np.zeros((2, 3), np.float32))}, TypeError, "^out: .*read-only"),
    ],
)
def test_file_rows(changes, error, message):
    with pytest.raises(error, match=message):
        multiply_file_rows(file_rows(**changes))


@pytest.mark.parametrize("threads", [0, -1, 1025, 2**31 - 1])
def test_threads_of_file_rows(threads):
    blocks, values = np.zeros((300, 1280), np.uint8), np.zeros((8, 2048), np.float32)  # enough to share
    for rows in (3, 300):
        if threads < 1 or rows == 300:
            with pytest.raises(ValueError, match=f"cannot use {threads} threads; expected 1 to 1024"):
                native.multiply_int8("q4_1", blocks[:rows], values, threads=threads)


def test_conversions():
    floats = np.zeros((2, 64), np.float32)
    blocks = native.quantize("q4_0", floats, 16)
    for size in (-32, -1, 2**62):
        with pytest.raises(ValueError, match=f"q4_0 weights cannot have {size} columns"):
            _core.row_bytes("q4_0", size)
        with pytest.raises(ValueError, match=f"q4_0 blocks cannot have {size} bytes a row"):
            _core.columns("q4_0", size)
    with pytest.raises(TypeError, match=r"out: expected a writable .*uint8 .*got uint8 \[2, 36\], read-only"):
        native.quantize("q4_0", floats, 16, out=frozen(blocks.copy()))
    with pytest.raises(TypeError, match=r"out: .*got list"):
        native.quantize("q4_0", floats, 16, out=[])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"blocks: .*got float32 \[2, 64\]"):
        native.dequantize("q4_0", floats, out=floats)
    with pytest.raises(TypeError, match=r"blocks: .*got list"):
        native.dequantize("q4_0", [[1]])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"weights of shape .* must be two-dimensional and C-contiguous"):
        native.quantize("q4_0", floats.T, 16)
    with pytest.raises(TypeError, match="weights must be a numpy array, not list"):
        native.quantize("q4_0", floats.tolist(), 16, element="f32")  # type: ignore[arg-type]
    sums = np.zeros((2, 2))
    with pytest.raises(TypeError, match=r"sums: .*float64 \[rows, 2\].*got float32"):
        _core.quantize("q4_0", "f32", floats.view(np.uint8), 16, 1, blocks, sums.astype(np.float32))
    with pytest.raises(ValueError, match=r"sums has shape \[1, 2\]; expected \[2, 2\]"):
        _core.quantize("q4_0", "f32", floats.view(np.uint8), 16, 1, blocks, sums[:1])
    for threads in (0, -1, -(2**63)):
        with pytest.raises(ValueError, match=f"cannot use {threads} threads; expected at least 1"):
            native.quantize("q4_0", floats, 16, threads=threads)
        with pytest.raises(ValueError, match=f"cannot use {threads} threads; expected at least 1"):
            native.dequantize("q4_0", blocks, threads=threads)
    assert np.array_equal(native.quantize("q4_0", floats, 16, threads=2**62), blocks)


@FUZZ
@given(st.data())
def test_any_arguments_of_conversions(data):
    draw = data.draw
    array = st.one_of(arrays(), anything)
    call(native.quantize, draw(formats), draw(array), draw(whole))
    call(native.dequantize, draw(formats), draw(array))
    call(_core.quantize, *map(draw, (formats, elements, array, whole, whole, array, array)))
    call(_core.dequantize, *map(draw, (formats, elements, array, whole, array)))
    call(_core.row_bytes, draw(formats), draw(whole))
    call(_core.columns, draw(formats), draw(whole))


@FUZZ
@given(st.data())
def test_any_arguments_of_matrices(data):
    draw = data.draw
    pool = _core.ThreadPool(1)
    type, columns = draw(st.sampled_from([("f32", 32), ("q4_0", 32), ("q8_0", 32), ("tq2_0", 256)]))
    one = native.PackedMatrix(type, draw(st.integers(1, 40)), columns)
    array = st.one_of(arrays(), anything)
    call(one.fill, draw(whole), draw(array))
    call(one.multiply_values, pool, *map(draw, (array, array, whole, whole)))
    call(one.multiply_codes, pool, *map(draw, (array, array, array, array, whole, whole)))
    call(one.read_row, draw(whole), draw(array))
    call(_core.quantize_tokens, *map(draw, (array, array, array, array)))
    call(_core.quantize_rows, *map(draw, (array, array, array, array)))
    call(_core.read_memory, pool, draw(array))


@FUZZ
@given(st.data())
def test_any_arguments_of_file_rows(data):
    draw = data.draw
    array = st.one_of(arrays(), anything)
    call(
        _core.multiply_file_rows, _core.ThreadPool(draw(st.integers(1, 3))), *map(draw, (formats, array, array, array))
    )
    call(native.multiply_int8, *map(draw, (formats, array, array)))
