"""Windows of several lengths become one array; every window is trained on or held out, never both."""

from __future__ import annotations

import numpy as np
import pytest

from quantlab import InputError
from quantlab.calibration.padded_windows import MOST_HELD_OUT, pad_windows


def test_ids_stand_at_the_front_and_zeros_after_them():
    windows = pad_windows([[5, 6, 7], [8], [9, 10]], 512, seed=0)
    assert windows.ids.tolist() == [[5, 6, 7], [8, 0, 0], [9, 10, 0]]
    assert windows.lengths.tolist() == [3, 1, 2]
    assert windows.tokens(np.array([0, 2])) == 5


@pytest.mark.parametrize(("count", "held_out"), [(2, 1), (16, 2), (1000, MOST_HELD_OUT)])
def test_each_window_has_one_purpose(count, held_out):
    windows = pad_windows([[3]] * count, 512, seed=0)
    assert len(windows.held_out) == held_out
    assert sorted([*windows.training, *windows.held_out]) == list(range(count))


def test_the_seed_draws_what_is_held_out():
    draws = [pad_windows([[3]] * 100, 512, seed=seed).held_out.tolist() for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize(
    ("windows", "problem"),
    [([], "at least 2"), ([[3, 4]], "at least 2"), ([[3], []], "at least 2"), ([[3, 4], [512]], "token 512")],
)
def test_windows_that_cannot_serve_are_refused(windows, problem):
    with pytest.raises(InputError, match=problem):
        pad_windows(windows, 512, seed=0)
