"""The quantizers, given what they cannot use: a Python exception that names it, and nothing worse."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import quantlab.native._core as _core
from bad_arguments import FORMATS, FUZZ, anything, arrays, call, every_other, formats, frozen, misaligned, whole
from hypothesis import given
from hypothesis import strategies as st

from quantlab import native
from quantlab.native import quantizers

ROWS, COLUMNS = 2, 64


def identity(columns: int = COLUMNS) -> np.ndarray:
    return np.eye(columns, dtype=np.float32)


def weights() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(ROWS, COLUMNS)).astype(np.float32)


def moment(columns: int = COLUMNS) -> Any:
    return _core.SecondMoment(identity(columns), 0.0, 1)


def factor(columns: int = COLUMNS) -> Any:
    return _core.feedback_factor(identity(columns), 0.0, np.arange(columns, dtype=np.int32), 1)


# Every door with arguments that it takes, by their names and in their order.
def arguments_of(door: str) -> dict[str, Any]:
    common = {"format": "q4_1", "levels": 16, "weights": weights()}
    blocks = {"threads": 1, "blocks": native.quantize("q4_1", weights(), 16)}
    importance = np.ones(COLUMNS, np.float32)
    effort = {"clips": 4, "rounds": 1}
    tiles = np.stack([identity(32)] * 2)
    order = np.arange(COLUMNS, dtype=np.int32)
    return {
        "SecondMoment": {"moment": identity(), "damping": 0.0, "threads": 1},
        "feedback_factor": {"moment": identity(), "damping": 0.0, "order": order, "threads": 1},
        "search_scales": {**common, "importance": importance, "by_magnitude": False, **effort, **blocks},
        "feed_back_errors": {**common, "factor": factor(), "importance": importance, "given_scales": False, **effort,
                             "trials": 1, **blocks},
        "refit_scales": {**common, "moment": moment(), "ridge": 1e-5, **blocks},
        "descend": {**common, "moment": moment(), "sweeps": 1, "trials": 1, "passes": 1, "scales": True, **blocks},
        "refine_blocks": {**common, "tiles": tiles, "trials": 1, "passes": 1, **blocks},
        "measure_errors": {"format": "q4_1", "weights": weights(), "moment": moment(), **blocks,
                           "sums": np.zeros((ROWS, 2))},
    }[door]  # fmt: skip


ON_BLOCKS = ("search_scales", "feed_back_errors", "refit_scales", "descend", "refine_blocks")
ON_WEIGHTS = (*ON_BLOCKS, "measure_errors")
DOORS = (*ON_WEIGHTS, "SecondMoment", "feedback_factor")
ARRAYS = {
    "SecondMoment": ["moment"], "feedback_factor": ["moment", "order"], "search_scales": ["weights", "importance"],
    "feed_back_errors": ["weights", "importance"], "refit_scales": ["weights"], "descend": ["weights"],
    "refine_blocks": ["weights", "tiles"], "measure_errors": ["weights", "sums"],
}  # fmt: skip
EVERY_ARRAY = [(door, name) for door, names in ARRAYS.items() for name in names]


def use(door: str, **changes: Any) -> Any:
    """Call with `changes`: by place, so that a wrong name is no TypeError."""
    arguments = arguments_of(door)
    assert set(changes) <= set(arguments)
    return getattr(_core, door)(*{**arguments, **changes}.values())


@pytest.mark.parametrize("door", DOORS)
def test_the_arguments_that_are_spoiled_below_are_good(door):
    use(door)


@pytest.mark.parametrize(("door", "name"), EVERY_ARRAY)
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (misaligned, r"address is no multiple of \d"),
        (every_other, "not contiguous"),
        (lambda array: array.astype(np.float16), "got float16"),
        (lambda array: array.astype(array.dtype.newbyteorder()), "got >"),
        (lambda array: array[None], r"got \w+ \[1, "),
        (lambda array: array.tolist(), "got list"),
        (lambda _: "text", "got str"),
    ],
    ids=["misaligned", "strided", "float16", "big-endian", "one dimension more", "list", "text"],
)
def test_arrays(door, name, spoil: Callable[[np.ndarray], Any], message):
    good = arguments_of(door)[name]
    with pytest.raises(TypeError, match=f"^{name}: expected .*C-contiguous array of .*{message}"):
        use(door, **{name: spoil(good)})


@pytest.mark.parametrize(("door", "name"), [pair for pair in EVERY_ARRAY if pair != ("feed_back_errors", "importance")])
def test_none_is_no_array(door, name):
    with pytest.raises(TypeError, match=f"^{name}: .*got NoneType"):
        use(door, **{name: None})


@pytest.mark.parametrize("door", ON_BLOCKS)
def test_blocks(door):
    good = arguments_of(door)["blocks"]
    with pytest.raises(TypeError, match=r"^blocks: expected a writable .*read-only"):
        use(door, blocks=frozen(good.copy()))
    for wrong in (good.view(np.int8), every_other(good), good[0], good.tolist(), None):
        with pytest.raises(TypeError, match=r"^blocks: expected a writable C-contiguous array of uint8"):
            use(door, blocks=wrong)
    for wrong in (good[:1], good[:, :20].copy(), good[:0], np.zeros((ROWS, 41), np.uint8)):
        with pytest.raises(
            ValueError, match=rf"blocks has shape \[{wrong.shape[0]}, {wrong.shape[1]}\]; expected \[2, 40\]"
        ):
            use(door, blocks=wrong)
    use(door, blocks=misaligned(good))  # bytes may lie anywhere


@pytest.mark.parametrize("door", ON_WEIGHTS)
@pytest.mark.parametrize("fault", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(door, fault):
    spoiled = weights()
    spoiled[1, 40] = fault
    blocks = arguments_of(door)["blocks"]
    before = blocks.copy()
    kind = "NaN" if np.isnan(fault) else "infinite"
    with pytest.raises(ValueError, match=rf"weights is {kind} at \[1, 40\]; expected finite numbers"):
        use(door, weights=spoiled, blocks=blocks)
    np.testing.assert_array_equal(blocks, before)


@pytest.mark.parametrize(
    ("door", "name", "place", "named"),
    [
        ("search_scales", "importance", (3,), "3"),
        ("feed_back_errors", "importance", (63,), "63"),
        ("SecondMoment", "moment", (5, 63), "5, 63"),
        ("refine_blocks", "tiles", (1, 3, 31), "1, 3, 31"),
    ],
)
def test_statistics_that_are_not_finite(door, name, place, named):
    spoiled = arguments_of(door)[name]
    spoiled[place] = np.nan
    with pytest.raises(ValueError, match=rf"{name} is NaN at \[{named}\]; expected finite numbers"):
        use(door, **{name: spoiled})


def test_a_moment_that_is_not_finite_has_no_factor():
    for place in ((5, 5), (5, 63), (63, 5)):
        spoiled = identity()
        spoiled[place] = spoiled[place[::-1]] = np.inf
        assert use("feedback_factor", moment=spoiled) is None
    for damping in (math.nan, math.inf, -math.inf, -2.0):
        assert use("feedback_factor", damping=damping) is None


@pytest.mark.parametrize("door", ON_WEIGHTS)
@pytest.mark.parametrize("columns", [0, 31, 40])
def test_columns_that_are_no_whole_blocks(door, columns):
    with pytest.raises(ValueError, match=f"weights have {columns} columns; expected a multiple of 32"):
        use(door, weights=np.zeros((ROWS, columns), np.float32))


@pytest.mark.parametrize("door", ON_WEIGHTS)
@pytest.mark.parametrize("shape", [(ROWS, 96), (ROWS, 32), (ROWS + 1, COLUMNS)])
def test_weights_that_are_not_the_blocks(door, shape):
    with pytest.raises(ValueError, match=r"blocks has shape \[2, 40\]; expected \["):
        use(door, weights=np.zeros(shape, np.float32))


@pytest.mark.parametrize("door", ON_WEIGHTS)
def test_no_rows_are_no_work(door):
    none = {"weights": weights()[:0], "blocks": arguments_of(door)["blocks"][:0]}
    use(door, **none, **({"sums": np.zeros((0, 2))} if door == "measure_errors" else {}))


@pytest.mark.parametrize("door", ON_WEIGHTS)
def test_formats(door):
    with pytest.raises(
        ValueError, match="unknown block format 'q9'; expected one of q4_0, q4_1, q5_0, q5_1, q8_0, tq2_0"
    ):
        use(door, format="q9")
    with pytest.raises(TypeError, match="format: str"):
        use(door, format=None)


@pytest.mark.parametrize("door", ON_BLOCKS)
@pytest.mark.parametrize("levels", [-1, 0, 1, 17, 2**31, 2**62])
def test_levels(door, levels):
    with pytest.raises(ValueError, match=f"q4_1 cannot use {levels} levels; expected 2 to 16"):
        use(door, levels=levels)


@pytest.mark.parametrize("door", DOORS)
def test_threads(door):
    for threads in (0, -1, -(2**63)):
        with pytest.raises(ValueError, match=f"cannot use {threads} threads; expected at least 1"):
            use(door, threads=threads)
    for threads in (2**63, None, "2", 1.5):
        with pytest.raises(TypeError, match="threads: int"):
            use(door, threads=threads)
    use(door, threads=2**62)


@pytest.mark.parametrize(
    ("door", "name", "least"),
    [
        ("search_scales", "clips", 2),
        ("search_scales", "rounds", 0),
        ("feed_back_errors", "clips", 2),
        ("feed_back_errors", "rounds", 0),
        ("feed_back_errors", "trials", 0),
        ("descend", "sweeps", 0),
        ("descend", "trials", -1),
        ("descend", "passes", 0),
        ("refine_blocks", "trials", -1),
        ("refine_blocks", "passes", 0),
    ],
)
def test_efforts(door, name, least):
    use(door, **{name: least})
    for wrong in (least - 1, 1001, 2**31 - 1, 2**62, -(2**63)):
        with pytest.raises(ValueError, match=f"{name} is {wrong}; expected {least} to 1000"):
            use(door, **{name: wrong})
    with pytest.raises(TypeError, match=f"{name}: int"):
        use(door, **{name: None})


@pytest.mark.parametrize("ridge", [-1.0, math.nan, math.inf, 1e300])
def test_ridges(ridge):
    with pytest.raises(ValueError, match="ridge must be a finite number from 0 on"):
        use("refit_scales", ridge=ridge)


@pytest.mark.parametrize("damping", [math.nan, math.inf, 1e300])
def test_dampings(damping):
    with pytest.raises(ValueError, match="damping must be a finite number"):
        use("SecondMoment", damping=damping)


@pytest.mark.parametrize("door", ["SecondMoment", "feedback_factor"])
@pytest.mark.parametrize("shape", [(0, 0), (40, 40), (64, 32), (32, 64), (64, 0)])
def test_shapes_of_moments(door, shape):
    message = (
        rf"moment has shape \[{shape[0]}, {shape[1]}\]; a second moment must be square, of whole blocks of 32 columns"
    )
    with pytest.raises(ValueError, match=message):
        use(door, moment=np.zeros(shape, np.float32))


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (np.zeros(COLUMNS, np.int32), "0 is there twice"),
        (np.arange(1, COLUMNS + 1, dtype=np.int32), "64 is none of 64"),
        (np.arange(-1, COLUMNS - 1, dtype=np.int32), "-1 is none of 64"),
        (np.full(COLUMNS, 2**31 - 1, np.int32), "2147483647 is none of 64"),
        (np.arange(32, dtype=np.int32), "order has 32 columns; expected 64"),
        (np.arange(0, dtype=np.int32), "order has 0 columns; expected 64"),
    ],
)
def test_orders(order, message):
    with pytest.raises(ValueError, match=message):
        use("feedback_factor", order=order)


@pytest.mark.parametrize(
    ("door", "changes", "message"),
    [
        ("search_scales", {"importance": np.ones(32, np.float32)}, "importance has 32 columns; expected 64"),
        ("feed_back_errors", {"importance": np.ones(96, np.float32)}, "importance has 96 columns; expected 64"),
        ("feed_back_errors", {"factor": lambda: factor(96)}, "the factor has 96 columns; expected 64"),
        ("refit_scales", {"moment": lambda: moment(32)}, "the second moment has 32 columns; expected 64"),
        ("descend", {"moment": lambda: moment(96)}, "the second moment has 96 columns; expected 64"),
        ("measure_errors", {"moment": lambda: moment(96)}, "the second moment has 96 columns; expected 64"),
        ("measure_errors", {"sums": np.zeros((2, 3))}, r"sums has shape \[2, 3\]; expected \[2, 2\]"),
        ("measure_errors", {"sums": np.zeros((1, 2))}, r"sums has shape \[1, 2\]; expected \[2, 2\]"),
        ("measure_errors", {"blocks": np.zeros((2, 20), np.uint8)}, r"blocks has shape \[2, 20\]"),
        ("refine_blocks", {"tiles": np.zeros((1, 32, 32), np.float32)}, r"tiles has shape \[1, 32, 32\]; expected \["),
        ("refine_blocks", {"tiles": np.zeros((2, 32, 31), np.float32)}, r"tiles has shape \[2, 32, 31\]; expected \["),
    ],
)  # fmt: skip
def test_shapes_that_do_not_belong_together(door, changes, message):
    made = {name: given() if callable(given) else given for name, given in changes.items()}
    with pytest.raises(ValueError, match=message):
        use(door, **made)


@pytest.mark.parametrize("door", ["feed_back_errors", "refit_scales", "descend", "measure_errors"])
def test_statistics_of_another_kind(door):
    name = "factor" if door == "feed_back_errors" else "moment"
    other = moment() if name == "factor" else factor()
    for wrong in (None, identity(), other):
        with pytest.raises(TypeError, match=f"{name}: "):
            use(door, **{name: wrong})
    made = getattr(_core, "FeedbackFactor" if name == "factor" else "SecondMoment")
    with pytest.raises(TypeError), pytest.warns(RuntimeWarning, match="uninitialized"):
        use(door, **{name: made.__new__(made)})


def test_the_python_door_names_arguments_too():
    blocks = arguments_of("descend")["blocks"]
    known, good = quantizers.SecondMoment(identity()), weights()
    for wrong in (None, identity(), moment()):
        with pytest.raises(TypeError, match="moment: expected a SecondMoment, got "):
            quantizers.refit("q4_1", good, 16, wrong, blocks)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="moment: expected a SecondMoment, got "):
            quantizers.descend("q4_1", good, 16, wrong, blocks)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="moment: expected a SecondMoment, got "):
            quantizers.weighted_squares("q4_1", good, wrong)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="factor: expected a FeedbackFactor, got "):
            quantizers.feed_back("q4_1", good, 16, wrong)  # type: ignore[arg-type]
    for wrong in (None, good[0], good.tolist(), good.astype(np.float64), 3):
        with pytest.raises(TypeError, match=r"^weights: "):
            quantizers.search("q4_1", wrong, 16, np.ones(COLUMNS, np.float32))  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"^weights: "):
            quantizers.weighted_squares("q4_1", wrong, known)  # type: ignore[arg-type]


array = st.one_of(arrays(), anything)
effort = st.one_of(st.integers(-2, 3), whole)


@FUZZ
@given(st.data(), st.sampled_from(DOORS))
def test_any_arguments(data, door):
    """Up to three arguments that are anything, the others good."""
    arguments = arguments_of(door)
    for name in data.draw(st.lists(st.sampled_from(sorted(arguments)), max_size=3)):
        good = arguments[name]
        kinds = [anything]
        if name == "format":
            kinds = [formats]
        elif isinstance(good, np.ndarray):
            kinds = [array]
        elif isinstance(good, int):
            kinds = [effort]
        elif isinstance(good, float):
            kinds = [st.floats(), anything]
        arguments[name] = data.draw(st.one_of(*kinds))
    call(getattr(_core, door), *arguments.values())


@FUZZ
@given(st.data(), st.sampled_from(sorted(FORMATS)), st.integers(0, 35), st.integers(1, 3))
def test_any_finite_weights_and_any_blocks(data, format, rows, blocks_a_row):
    """Numbers of any size, blocks of any bytes: scales that are NaN or infinite, codes beyond the levels."""
    columns, draw = 32 * blocks_a_row, data.draw
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    values = rng.integers(0, 2**32, (rows, columns), dtype=np.uint32).view(np.float32)
    values[~np.isfinite(values)] = 0
    if draw(st.booleans()):
        values *= np.float32(1e-36)
    blocks = rng.integers(0, 256, (rows, blocks_a_row * FORMATS[format]), dtype=np.uint8)
    square = rng.normal(size=(columns, columns)).astype(np.float32) * np.float32(
        draw(st.sampled_from([1, 1e-30, 1e30]))
    )
    levels = draw(st.sampled_from([3, 16]))
    known = _core.SecondMoment(square, draw(st.sampled_from([0.0, 1.0, 1e30])), 2)
    order = rng.permutation(columns).astype(np.int32)
    with np.errstate(over="ignore"):
        made = _core.feedback_factor(square @ square.T, 1.0, order, 2)
    importance = np.abs(square[0])
    _core.search_scales(format, levels, values, importance, draw(st.booleans()), 3, 1, 2, blocks.copy())
    _core.refit_scales(format, levels, values, known, 0.0, 2, blocks)
    _core.descend(format, levels, values, known, 1, draw(st.integers(-1, 1)), 1, True, 2, blocks)
    if made is not None:
        _core.feed_back_errors(format, levels, values, made, importance, True, 2, 0, 1, 2, blocks)
    _core.refine_blocks(format, levels, values, square[:32, :32][None].repeat(blocks_a_row, 0), 1, 1, 2, blocks)
    _core.measure_errors(format, values, known, 2, blocks, np.zeros((rows, 2)))
    assert blocks.shape == (rows, blocks_a_row * FORMATS[format])
