"""The sampler, given what it cannot use: a Python exception that names it, and nothing worse."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import quantlab.native._core as _core
from bad_arguments import FUZZ, REFUSALS, anything, arrays, call, every_other, misaligned, whole
from hypothesis import given
from hypothesis import strategies as st

from quantlab import native

VOCABULARY = 70  # more than a block of 64
SETTINGS = {"logit_bias": [], "repetition_penalty": 2.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
SETTINGS |= {"penalty_window": 0, "temperature": 1.0, "top_k": 0, "top_p": 0.9, "min_p": 0.0, "seed": 0}
COUNTS = ("penalty_window", "top_k", "seed")
REALS = ("repetition_penalty", "presence_penalty", "frequency_penalty", "temperature", "top_p", "min_p")


def sampler(**changes: Any) -> native.Sampler:
    return native.Sampler(VOCABULARY, **{**SETTINGS, **changes})


def logits() -> np.ndarray:
    return np.linspace(-2, 2, VOCABULARY, dtype=np.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logit_bias": [(70, 1.0)]}, "logit_bias: token id 70 is outside the vocabulary of 70"),
        ({"logit_bias": [(3, 1.0), (-1, 1.0)]}, "logit_bias: token id -1 is outside"),
        ({"logit_bias": [(2**40, 1.0)]}, "logit_bias: token id 1099511627776 is outside"),
        ({"logit_bias": [(3, math.nan)]}, "logit_bias of token id 3 is nan; expected a number below infinity"),
        ({"logit_bias": [(3, math.inf)]}, "logit_bias of token id 3 is inf"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; expected above 0 and finite"),
        ({"repetition_penalty": -1.0}, "repetition_penalty is -1.0"),
        ({"repetition_penalty": math.nan}, "repetition_penalty is nan"),
        ({"presence_penalty": math.inf}, "presence_penalty is inf; expected a finite number"),
        ({"frequency_penalty": math.nan}, "frequency_penalty is nan; expected a finite number"),
        ({"penalty_window": -1}, "penalty_window is -1; expected 0 or more"),
        ({"temperature": -1e-9}, "temperature is -1e-09; expected 0 or more"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_k": -1}, "top_k is -1; expected 0 or more"),
        ({"top_p": 0.0}, "top_p is 0.0; expected above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_p": math.nan}, "top_p is nan"),
        ({"min_p": -0.5}, "min_p is -0.5; expected 0 to 1"),
        ({"min_p": math.nan}, "min_p is nan"),
    ],
)
def test_settings_out_of_range(changes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        sampler(**changes)


@pytest.mark.parametrize("vocabulary", [0, -1, 2**22 + 1, 2**62])
def test_sizes_of_a_vocabulary(vocabulary):
    with pytest.raises(ValueError, match=f"vocabulary is {vocabulary}; expected 1 to 4194304"):
        native.Sampler(vocabulary, **SETTINGS)


@pytest.mark.parametrize(
    "changes",
    [{name: "x"} for name in SETTINGS] + [{name: None} for name in SETTINGS]
    + [{"logit_bias": [3]}, {"seed": -1}, {"seed": 2**64}, {"top_k": 2**63}, {"top_k": 1.5}],
)  # fmt: skip
def test_settings_of_another_type(changes):
    with pytest.raises(TypeError, match=f"{next(iter(changes))}: "):
        sampler(**changes)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (logits().astype(np.float64), TypeError, r"^logits: .* float32 \[vocabulary\] .*got float64 \[70\]"),
        (logits()[None], TypeError, r"^logits: .*got float32 \[1, 70\]"),
        (every_other(logits()), TypeError, r"^logits: .*got float32 \[70\], not contiguous"),
        (misaligned(logits()), TypeError, "^logits: .*address is no multiple of 4"),
        (logits().astype(">f4"), TypeError, "^logits: .*got >f4"),
        (logits().tolist(), TypeError, "^logits: .*got list"),
        (None, TypeError, "^logits: .*got NoneType"),
        (logits()[:69], ValueError, "there are 69 logits; expected 70"),
        (logits()[:0], ValueError, "there are 0 logits; expected 70"),
        (np.where(np.arange(70) == 69, np.float32(np.nan), logits()), ValueError, "the logit of token 69 is NaN"),
        (np.where(np.arange(70) == 3, np.float32(np.inf), logits()), ValueError, "the logit of token 3 is infinite"),
        (np.full(70, -np.inf, np.float32), ValueError, "every token's logit is minus infinity"),
    ],
)
def test_logits(given, error, message):
    one = sampler()
    with pytest.raises(error, match=message):
        one.draw(given, [], 0, 0)
    assert 0 <= one.draw(logits(), [], 0, 0) < VOCABULARY


@pytest.mark.parametrize(
    ("history", "error", "message"),
    [
        ([3, 70], ValueError, "token id 70 is outside the vocabulary of 70"),
        ([-1], ValueError, "token id -1 is outside the vocabulary of 70"),
        ([2**63 - 1], ValueError, "token id 9223372036854775807 is outside"),
        ([2**63], TypeError, "^history: expected token ids, got 9223372036854775808"),
        ([1, "a"], TypeError, "^history: expected token ids, got 'a'"),
        ([None], TypeError, "^history: expected token ids, got None"),
        ([1.0], TypeError, "^history: expected token ids, got 1.0"),
        (None, TypeError, "history: list"),
        ((1, 2), TypeError, "history: list"),
        (np.array([1, 2]), TypeError, "history: list"),
    ],
)
def test_histories(history, error, message):
    with pytest.raises(error, match=message):
        sampler().draw(logits(), history, 0, 0)


def test_a_history_that_changes_meanwhile():
    class Token:
        def __init__(self, history: list[Any]) -> None:
            self.history = history

        def __index__(self) -> int:
            self.history.clear()
            return 5

    history: list[Any] = []
    history += [Token(history), *range(2000)]
    assert 0 <= sampler().draw(logits(), history, 0, 0) < VOCABULARY


@pytest.mark.parametrize("prompt", [-1, -(2**63)])
def test_prompts_of_negative_length(prompt):
    with pytest.raises(ValueError, match=f"prompt is {prompt}; expected 0 or more"):
        sampler().draw(logits(), [1], prompt, 0)


def test_positions_are_whole_numbers():
    for position in (-1, 2**64, None, 0.5):
        with pytest.raises(TypeError, match="position: int"):
            sampler().draw(logits(), [], 0, position)
    assert 0 <= sampler().draw(logits(), [1], 2**63 - 1, 2**64 - 1) < VOCABULARY


def test_random_words_take_whole_numbers():
    for wrong in (-1, 2**64, None, 0.5):
        with pytest.raises(TypeError, match="key: int, counter: int"):
            _core.random_word(wrong, 0)
        with pytest.raises(TypeError, match="key: int, counter: int"):
            _core.random_word(0, wrong)


def test_a_sampler_that_was_never_made():
    with pytest.raises(TypeError), pytest.warns(RuntimeWarning, match="uninitialized"):
        native.Sampler.__new__(native.Sampler).draw(logits(), [], 0, 0)


reals = st.one_of(st.floats(), st.sampled_from([0.0, 1.0, 1e-300, 1e300]))
numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)


@FUZZ
@given(st.data())
def test_any_arguments(data):
    draw = data.draw
    changes = {name: draw(st.one_of(whole, anything)) for name in draw(st.sets(st.sampled_from(COUNTS), max_size=1))}
    changes |= {name: draw(reals) for name in draw(st.sets(st.sampled_from(REALS), max_size=2))}
    if draw(st.booleans()):
        changes["logit_bias"] = draw(st.one_of(st.lists(st.tuples(whole, reals), max_size=3), anything))
    try:
        one = native.Sampler(draw(st.integers(1, 70)), **{**SETTINGS, **changes})
    except REFUSALS as error:
        assert str(error)  # noqa: PT017
        return
    given = draw(st.one_of(arrays(), st.lists(numbers, max_size=70).map(lambda x: np.array(x, np.float32))))
    call(one.draw, given, draw(st.one_of(st.lists(whole, max_size=4), anything)), draw(whole), draw(whole))


@FUZZ
@given(
    st.data(),
    st.integers(1, 200),
    st.sampled_from([0.0, 1e-300, 0.7, 1e300]),
    st.integers(0, 210),
    st.floats(2.0**-1074, 1),
    st.floats(0, 1),
)
def test_whatever_it_takes_it_draws_a_token_of_the_vocabulary(data, vocabulary, temperature, top_k, top_p, min_p):
    values = data.draw(st.lists(numbers, min_size=vocabulary, max_size=vocabulary))
    settings = {**SETTINGS, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    one = native.Sampler(vocabulary, **settings)
    for position in (0, 2**64 - 1):
        assert 0 <= one.draw(np.array(values, np.float32), [0], 0, position) < vocabulary
