"""Arguments for the doors of the core: what spoils good ones, and any at all."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from quantlab import native

FORMATS = {"q4_0": 18, "q4_1": 20, "q5_0": 22, "q5_1": 24, "q8_0": 34}


def matrix(rows: int, columns: int, seed: int = 0) -> native.PackedMatrix:
    made = native.PackedMatrix("f32", rows, columns)
    values = np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)
    made.fill(0, values.view(np.uint8))
    return made


def misaligned(array: np.ndarray) -> np.ndarray:
    raw = np.zeros(array.nbytes + 1, np.uint8)
    shifted = raw[1:].view(array.dtype).reshape(array.shape)
    shifted[...] = array
    return shifted


def frozen(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


def every_other(array: np.ndarray) -> np.ndarray:
    return np.repeat(array, 2, axis=-1)[..., ::2]


# What a door may raise for arguments that make no sense; anything else is a defect.
REFUSALS = (TypeError, ValueError, IndexError, KeyError, MemoryError, OverflowError)

dtypes = st.sampled_from(["u1", "i1", "i4", "i8", "f2", "f4", "f8", ">f4", "?", "O"])
small = st.integers(0, 70)
whole = st.one_of(
    st.integers(-2, 70), st.sampled_from([2**31 - 1, 2**31, -(2**31), 2**63 - 1, 2**63, -(2**63), 2**100])
)


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    shape = tuple(
        draw(st.lists(st.sampled_from([0, 1, 2, 16, 18, 20, 21, 32, 36, 40, 64, 66]), min_size=0, max_size=3))
    )
    array = np.zeros(shape, draw(dtypes))
    twist = draw(st.integers(0, 5))
    if twist == 1 and array.dtype != object:
        array = misaligned(array)
    elif twist == 2:
        array = array.T
    elif twist == 3 and array.ndim:
        array = every_other(array)
    elif twist == 4:
        array = frozen(array)
    return array


anything = st.one_of(
    arrays(), whole, st.none(), st.booleans(), st.floats(), st.text(max_size=3), st.binary(max_size=40), st.just([])
)
formats = st.one_of(st.sampled_from([*sorted(FORMATS), "tq2_0"]), st.just("q9"), anything)
elements = st.one_of(st.sampled_from(["f32", "f16", "bf16"]), anything)
names = st.one_of(st.sampled_from(["query", "up", "head", "final_norm", "key_norm"]), anything)
FUZZ = settings(max_examples=400, deadline=None, derandomize=True)


def call(door: Callable[..., object], *arguments: object) -> None:
    try:
        door(*arguments)
    except REFUSALS as error:
        assert str(error) or isinstance(error, MemoryError)  # noqa: PT017
