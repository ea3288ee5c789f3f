"""Low-rank updates, given what they cannot use: a Python exception that names it, and nothing written."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import quantlab.native._core as _core
from bad_arguments import FUZZ, anything, arrays, call, every_other, formats, frozen, misaligned, whole
from hypothesis import given
from hypothesis import strategies as st

from quantlab import native
from quantlab.native import adapters

ROWS, COLUMNS, RANK = 4, 64, 3


# Every door with arguments that it takes, by their names and in their order.
def arguments_of(door: str) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    columns = COLUMNS // 32 if door == "shift_minimums" else COLUMNS
    a, b = rng.normal(size=(RANK, columns)).astype(np.float32), rng.normal(size=(ROWS, RANK)).astype(np.float32)
    pair = {"a": a, "b": b, "scale": 0.5}
    blocks = native.quantize("q4_1", rng.normal(size=(ROWS, COLUMNS)).astype(np.float32), 16)
    if door == "low_rank_product":
        return {**pair, "threads": 1, "out": np.zeros((ROWS, COLUMNS), np.float32)}
    if door == "with_minimums":
        values = np.zeros((ROWS, COLUMNS // 32), np.float16)
        return {"format": "q4_1", "blocks": blocks, "values": values, "out": np.zeros_like(blocks)}
    levels = {"levels": 16} if door == "rechoose_codes" else {}
    return {"format": "q4_1", "blocks": blocks, **pair, **levels, "threads": 1, "out": np.zeros_like(blocks)}


ON_PAIRS = ("low_rank_product", "rechoose_codes", "shift_minimums")
ON_BLOCKS = ("rechoose_codes", "shift_minimums", "with_minimums")
DOORS = ("low_rank_product", *ON_BLOCKS)


def use(door: str, **changes: Any) -> Any:
    arguments = arguments_of(door)
    assert set(changes) <= set(arguments)
    arguments.update(changes)
    out = arguments["out"]
    before = out.copy() if isinstance(out, np.ndarray) else None
    names = [name for name in ("format", "blocks", "a", "b", "scale", "values") if name in arguments]
    try:
        return getattr(adapters, door)(*[arguments.pop(name) for name in names], **arguments)
    except (TypeError, ValueError):
        if before is not None:
            np.testing.assert_array_equal(out, before)
        raise


@pytest.mark.parametrize("door", DOORS)
def test_the_arguments_that_are_spoiled_below_are_good(door):
    use(door)
    use(door, out=None)


@pytest.mark.parametrize("door", ON_PAIRS)
@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (misaligned, r"address is no multiple of \d"),
        (every_other, "not contiguous"),
        (lambda array: array.astype(np.float16), "got float16"),
        (lambda array: array.astype(np.float64), "got float64"),
        (lambda array: array.astype(array.dtype.newbyteorder()), "got >"),
        (lambda array: array[None], r"got \w+ \[1, "),
        (lambda array: array.tolist(), "got list"),
        (lambda _: None, "got NoneType"),
    ],
    ids=["misaligned", "strided", "float16", "float64", "big-endian", "one dimension more", "list", "none"],
)
def test_pairs(door, name, spoil: Callable[[np.ndarray], Any], message):
    good = arguments_of(door)[name]
    with pytest.raises(TypeError, match=f"^{name}: expected a C-contiguous array of float32 .*{message}"):
        use(door, **{name: spoil(good)})


@pytest.mark.parametrize("door", ON_BLOCKS)
def test_blocks(door):
    good = arguments_of(door)["blocks"]
    for wrong in (good.view(np.int8), every_other(good), good[0], good.tolist(), None, good.astype(np.float32)):
        with pytest.raises(TypeError, match=r"^blocks: expected a C-contiguous array of uint8 \[rows, row bytes\]"):
            use(door, blocks=wrong)
    for wrong in (good[:1], good[:, :20].copy(), good[:0], np.zeros((ROWS, 41), np.uint8)):
        with pytest.raises(ValueError, match=r"shape \[\d+, \d+\]; expected \[|41 bytes a row; expected a multiple"):
            use(door, blocks=wrong)
    np.testing.assert_array_equal(use(door, blocks=misaligned(good)), use(door))  # bytes may lie anywhere


@pytest.mark.parametrize("door", DOORS)
def test_results(door):
    good = arguments_of(door)["out"]
    for wrong in (every_other(good), good[0], good.tolist(), good.astype(np.int16), frozen(good.copy())):
        with pytest.raises(TypeError, match=r"^out: expected a (writable )?"):
            use(door, out=wrong)
    for wrong in (good[:1], good[:0], np.concatenate([good, good], axis=1)):
        with pytest.raises(ValueError, match=r"out has shape \[\d+, \d+\]; expected \[4, \d+\]"):
            use(door, out=wrong)


@pytest.mark.parametrize("door", ["rechoose_codes", "shift_minimums", "with_minimums"])
def test_results_may_lie_at_any_address(door):
    expected = use(door)
    out = misaligned(arguments_of(door)["out"])
    np.testing.assert_array_equal(use(door, out=out), expected)


@pytest.mark.parametrize("door", ON_PAIRS)
def test_ranks_that_differ(door):
    with pytest.raises(ValueError, match=r"b has shape \[4, 5\]; expected \[4, 3\]"):
        use(door, b=np.zeros((ROWS, 5), np.float32))


@pytest.mark.parametrize("columns", [0, 32, 40, 96])
def test_updates_of_other_columns(columns):
    message = "40 columns; expected a multiple of 32" if columns == 40 else r"has shape \[4, 40\]; expected \[4, "
    with pytest.raises(ValueError, match=message):
        use("rechoose_codes", a=np.zeros((RANK, columns), np.float32))
    with pytest.raises(ValueError, match=rf"the update has shape \[4, {columns}\]; expected \[4, 2\], one of each"):
        use("shift_minimums", a=np.zeros((RANK, columns), np.float32))


@pytest.mark.parametrize("door", ["rechoose_codes", "shift_minimums"])
def test_updates_of_other_rows(door):
    with pytest.raises(ValueError, match=r"shape \[[34], \d+\]; expected \[[34], \d+\]"):
        use(door, b=np.zeros((ROWS - 1, RANK), np.float32))


@pytest.mark.parametrize("door", ON_PAIRS)
@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf, 1e300])
def test_scales(door, scale):
    with pytest.raises(ValueError, match="scale must be a finite number of single precision"):
        use(door, scale=scale)


@pytest.mark.parametrize("door", ON_PAIRS)
def test_scales_that_are_no_numbers(door):
    for wrong in (None, "1", [1.0]):
        with pytest.raises(TypeError, match="scale: float"):
            use(door, scale=wrong)


@pytest.mark.parametrize("door", ON_PAIRS)
def test_threads(door):
    for threads in (0, -1, -(2**63)):
        with pytest.raises(ValueError, match=f"cannot use {threads} threads; expected at least 1"):
            use(door, threads=threads)
    for threads in (2**63, "2", 1.5):
        with pytest.raises(TypeError, match="threads: int"):
            use(door, threads=threads)
    use(door, threads=2**62)


@pytest.mark.parametrize("door", ON_BLOCKS)
def test_formats(door):
    with pytest.raises(
        ValueError, match="unknown block format 'q9'; expected one of q4_0, q4_1, q5_0, q5_1, q8_0, tq2_0"
    ):
        use(door, format="q9")
    with pytest.raises(TypeError, match="format: str"):
        use(door, format=None)


@pytest.mark.parametrize("format", ["q4_0", "q5_0", "q8_0"])
@pytest.mark.parametrize("door", ["shift_minimums", "with_minimums"])
def test_formats_without_minimum(door, format):
    with pytest.raises(ValueError, match=f"{format} blocks have no minimum; expected one of q4_1, q5_1"):
        use(door, format=format)
    with pytest.raises(ValueError, match=f"{format} blocks have no minimum"):
        adapters.minimums(format, arguments_of(door)["blocks"])


@pytest.mark.parametrize("levels", [-1, 0, 1, 17, 2**31, 2**62])
def test_levels(levels):
    with pytest.raises(ValueError, match=f"q4_1 cannot use {levels} levels; expected 2 to 16"):
        use("rechoose_codes", levels=levels)


def test_minimums_that_are_not_the_blocks():
    values = arguments_of("with_minimums")["values"]
    for wrong in (values.astype(np.float32), values.view(np.uint16), values.tolist(), None):
        with pytest.raises(TypeError, match=r"values: expected an array of float16 \[rows, blocks a row\], got"):
            use("with_minimums", values=wrong)
    for wrong in (values[:1], values[:, :1], values[0], values[None]):
        with pytest.raises(ValueError, match=r"values has shape .*; expected \[4, 2\], one of each block"):
            use("with_minimums", values=wrong)


def test_no_rows_and_no_columns_are_no_work():
    for rows, columns, rank in ((0, 64, 3), (4, 0, 3), (4, 64, 0), (0, 0, 0)):
        a, b = np.zeros((rank, columns), np.float32), np.zeros((rows, rank), np.float32)
        blocks = np.zeros((rows, columns // 32 * 20), np.uint8)
        assert adapters.low_rank_product(a, b, 1.0).shape == (rows, columns)
        np.testing.assert_array_equal(adapters.rechoose_codes("q4_1", blocks, a, b, 1.0), blocks)
        in_blocks = np.zeros((rank, columns // 32), np.float32)
        np.testing.assert_array_equal(adapters.shift_minimums("q4_1", blocks, in_blocks, b, 1.0), blocks)


scales = st.one_of(st.floats(), anything)


@given(arrays(), arrays(), scales, whole, arrays())
@FUZZ
def test_products_of_anything(a, b, scale, threads, out):
    call(_core.low_rank_product, a, b, scale, threads, out)


@given(formats, st.one_of(st.none(), whole), arrays(), arrays(), arrays(), scales, whole, arrays())
@FUZZ
def test_codes_of_anything(format, levels, blocks, a, b, scale, threads, out):
    call(_core.rechoose_codes, format, levels, blocks, a, b, scale, threads, out)


@given(formats, anything, anything, anything, scales)
@FUZZ
def test_shifts_of_anything(format, blocks, a, b, scale):
    call(lambda *arguments: adapters.shift_minimums(*arguments, threads=1), format, blocks, a, b, scale)
    call(adapters.with_minimums, format, blocks, a)
