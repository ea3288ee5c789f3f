"""Likelihood and divergence against float64, exact zeros, and standard errors that a bootstrap confirms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlab import divergence
from quantlab.divergence import compare_logits, kl_divergence, mean_and_stderr, negative_log_likelihood, same_top
from quantlab.errors import InputError


def random_logits(seed: int, tokens: int = 50, vocabulary: int = 300, scale: float = 4.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, (tokens, vocabulary)).astype(np.float32)


def torch_nll(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The same in float64, by torch."""
    wide = torch.from_numpy(logits).double()
    return torch.nn.functional.cross_entropy(wide, torch.from_numpy(targets), reduction="none").numpy()


def torch_kl(logits_a: np.ndarray, logits_b: np.ndarray) -> np.ndarray:
    """The same in float64, by torch."""
    log_a, log_b = (torch.from_numpy(logits).double().log_softmax(1) for logits in (logits_a, logits_b))
    return torch.nn.functional.kl_div(log_b, log_a, log_target=True, reduction="none").sum(1).numpy()


# Values.


@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0, 100.0])
def test_likelihood_is_torchs_in_float64(scale: float) -> None:
    """To 1e-6 nats: exponentials are fp32, their sum is fp64."""
    logits = random_logits(0, scale=scale)
    targets = np.random.default_rng(1).integers(0, 300, 50)
    values = negative_log_likelihood(logits, targets)
    assert values.dtype == np.float64
    np.testing.assert_allclose(values, torch_nll(logits, targets), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("distance", [1e-3, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0])
def test_divergence_is_torchs_in_float64(scale: float, distance: float) -> None:
    """Near and far distributions, flat and peaked ones, to 1e-6 nats."""
    logits_a = random_logits(0, scale=scale)
    logits_b = logits_a + random_logits(1, scale=distance * scale)
    values = kl_divergence(logits_a, logits_b)
    assert values.dtype == np.float64
    np.testing.assert_allclose(values, torch_kl(logits_a, logits_b), rtol=1e-6, atol=1e-6)


def test_all_figures_at_once_are_the_single_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, and blocks of rows change nothing."""
    logits_a, logits_b = random_logits(0), random_logits(1)
    targets = np.random.default_rng(2).integers(0, 300, 50)
    found = compare_logits(logits_a, logits_b, targets)
    assert np.array_equal(found.nll_a, negative_log_likelihood(logits_a, targets))
    assert np.array_equal(found.nll_b, negative_log_likelihood(logits_b, targets))
    assert np.array_equal(found.kld, kl_divergence(logits_a, logits_b))
    assert np.array_equal(found.top_a == found.top_b, same_top(logits_a, logits_b))
    assert np.array_equal(found.top_a, logits_a.argmax(axis=1))
    monkeypatch.setattr(divergence, "BLOCK", 300 * 7)
    again = compare_logits(logits_a, logits_b, targets)
    for name in ("nll_a", "nll_b", "kld", "top_a", "top_b"):
        np.testing.assert_allclose(getattr(again, name), getattr(found, name), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_numbers_show(bad: float) -> None:
    """Figures of that token are not finite, whichever model it was; the others are as they were."""
    logits, broken = random_logits(0), random_logits(0)
    broken[3, 5] = bad
    for first, second in ((broken, logits), (logits, broken)):
        found = compare_logits(first, second, np.zeros(50, dtype=np.int64))
        assert not np.isfinite(found.kld[3])
        assert np.isfinite(np.delete(found.kld, 3)).all()


def test_a_worked_example() -> None:
    """p = (1/2, 1/4, 1/4) and q = (1/4, 1/4, 1/2): KL(p || q) = 1/2 ln 2 - 1/4 ln 2."""
    p, q = (np.log(np.array([weights], dtype=np.float32)) for weights in ((2, 1, 1), (1, 1, 2)))
    assert kl_divergence(p, q)[0] == pytest.approx(math.log(2) / 4, abs=1e-7)
    assert negative_log_likelihood(p, np.array([0]))[0] == pytest.approx(math.log(2), abs=1e-7)
    assert negative_log_likelihood(p, np.array([2]))[0] == pytest.approx(math.log(4), abs=1e-7)


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_equal_logits_diverge_by_exactly_nothing(scale: float) -> None:
    """Not by a rounding error: a model compared with itself shows 0."""
    logits = random_logits(0, scale=scale)
    assert kl_divergence(logits, logits.copy()).tolist() == [0.0] * 50


def test_extreme_logits_stay_finite() -> None:
    """1e4 apart, exponentials over- or underflow; -1e30 stands for tokens that cannot come, as masks write it."""
    logits_a = np.array([[1e4, 0, -1e4], [-1e4, -1e4, -1e4], [0, -1e30, 1], [3e4, 3e4, -1e30]], dtype=np.float32)
    logits_b = np.array([[0, 1e4, -1e4], [1e4, -1e4, 0], [1, -1e30, 0], [-1e30, 0, -1e30]], dtype=np.float32)
    for first, second in ((logits_a, logits_b), (logits_b, logits_a)):
        np.testing.assert_allclose(kl_divergence(first, second), torch_kl(first, second), rtol=1e-6, atol=1e-6)
        for target in range(3):
            targets = np.full(4, target)
            np.testing.assert_allclose(
                negative_log_likelihood(first, targets), torch_nll(first, targets), rtol=1e-6, atol=1e-6
            )


def test_same_top_compares_the_first_ranks() -> None:
    """Ties go to the smaller id on both sides."""
    logits_a = np.array([[1, 2, 3], [1, 2, 3], [5, 5, 0]], dtype=np.float32)
    logits_b = np.array([[0, 0, 9], [9, 0, 0], [7, 1, 0]], dtype=np.float32)
    assert same_top(logits_a, logits_b).tolist() == [True, False, True]


def test_arguments_are_left_as_they_were() -> None:
    logits_a, logits_b = random_logits(0), random_logits(1)
    before = logits_a.copy(), logits_b.copy()
    kl_divergence(logits_a, logits_b)
    negative_log_likelihood(logits_a, np.zeros(50, dtype=np.int64))
    assert np.array_equal(logits_a, before[0])
    assert np.array_equal(logits_b, before[1])


# Properties. Logits are multiples of 1/64, to which whole constants add without rounding.

LOGITS = st.lists(st.integers(-64 * 50, 64 * 50), min_size=8, max_size=8)


def as_logits(numbers: list[int]) -> np.ndarray:
    return np.array([numbers], dtype=np.float32) / 64


@settings(max_examples=200, deadline=None, derandomize=True)
@given(numbers_a=LOGITS, numbers_b=LOGITS)
def test_divergence_is_never_negative(numbers_a: list[int], numbers_b: list[int]) -> None:
    """Beyond rounding errors of fp32."""
    assert kl_divergence(as_logits(numbers_a), as_logits(numbers_b))[0] >= -1e-6


@settings(max_examples=200, deadline=None, derandomize=True)
@given(numbers_a=LOGITS, numbers_b=LOGITS, add_a=st.integers(-1000, 1000), add_b=st.integers(-1000, 1000))
def test_a_constant_changes_nothing(numbers_a: list[int], numbers_b: list[int], add_a: int, add_b: int) -> None:
    """Logits are defined up to a constant; where adding it is exact, results are equal to the last bit."""
    logits_a, logits_b = as_logits(numbers_a), as_logits(numbers_b)
    moved_a, moved_b = logits_a + np.float32(add_a), logits_b + np.float32(add_b)
    targets = np.array([3])
    assert negative_log_likelihood(moved_a, targets) == negative_log_likelihood(logits_a, targets)
    assert kl_divergence(moved_a, moved_b) == kl_divergence(logits_a, logits_b)
    assert same_top(moved_a, moved_b) == same_top(logits_a, logits_b)


# Means and their standard errors.


def test_mean_and_standard_error_by_hand() -> None:
    """Windows (1, 2), (3), (4, 5, 6): the mean is 21 / 6; window sums less mean times length are -4, -1/2, 9/2.

    So the variance of the sum is 3/2 * (16 + 1/4 + 81/4) = 219/4.
    """
    mean, stderr = mean_and_stderr([np.array([1.0, 2.0]), np.array([3.0]), np.array([4.0, 5.0, 6.0])])
    assert mean == pytest.approx(3.5, rel=1e-15)
    assert stderr == pytest.approx(math.sqrt(219 / 4) / 6, rel=1e-15)


def test_windows_of_one_token_give_the_ordinary_standard_error() -> None:
    """The standard deviation over the root of the number."""
    values = np.random.default_rng(0).normal(size=40)
    mean, stderr = mean_and_stderr([values[i : i + 1] for i in range(40)])
    assert mean == pytest.approx(values.mean(), rel=1e-12)
    assert stderr == pytest.approx(values.std(ddof=1) / math.sqrt(40), rel=1e-12)


def test_a_bootstrap_over_windows_agrees() -> None:
    """Windows of unequal length whose tokens are correlated; taking tokens as independent would claim half the error.

    With 4000 resamples the bootstrap's own error is about 1 %; 5 % are allowed.
    """
    random = np.random.default_rng(0)
    windows = [random.normal(3 + random.normal(0, 0.5), 1.0, random.integers(5, 60)) for _ in range(300)]
    _, stderr = mean_and_stderr(windows)
    sums = np.array([window.sum() for window in windows])
    counts = np.array([len(window) for window in windows])
    picks = random.integers(0, len(windows), (4000, len(windows)))
    bootstrap = (sums[picks].sum(1) / counts[picks].sum(1)).std(ddof=1)
    assert stderr == pytest.approx(bootstrap, rel=0.05)
    tokens = np.concatenate(windows)
    assert stderr > 2 * tokens.std(ddof=1) / math.sqrt(len(tokens))


def test_a_single_window_takes_its_tokens_as_units() -> None:
    """There is nothing else to compare; windows without tokens count for nothing."""
    values = np.array([1.0, 2.0, 4.0, 5.0])
    for windows in ([values], [np.array([]), values, np.array([])]):
        mean, stderr = mean_and_stderr(windows)
        assert mean == 3
        assert stderr == pytest.approx(math.sqrt(10 / 3 / 4), rel=1e-15)


def test_a_single_token_has_no_standard_error() -> None:
    mean, stderr = mean_and_stderr([np.array([2.5])])
    assert mean == 2.5
    assert math.isnan(stderr)


@pytest.mark.parametrize("windows", [[], [np.array([])], [np.array([]), np.array([])]])
def test_no_tokens_are_an_error(windows: list[np.ndarray]) -> None:
    with pytest.raises(InputError, match="the text holds no token to score"):
        mean_and_stderr(windows)
