"""When training is given up."""

from __future__ import annotations

import math

import numpy as np
import pytest

from quantlab.calibration.patience import is_given_up


@pytest.mark.parametrize(
    ("losses", "given_up"),
    [
        ([5, 6, 7, 8], True),
        ([5, 6, 7, 8, 7.9], False),  # on the way down, as learning rates fall: the best may be to come
        ([5, 6, 7, 6.5, 6], False),
        ([5, 6, 7], False),  # too few
        ([5, 4, 5, 6, 7], True),
        ([5, 6, 4, 5, 6], False),  # two after the best
        ([5, 5, 5, 5], True),
        ([5, math.nan, math.nan, math.nan], True),
    ],
)
def test_runs_are_given_up_when_losses_rise_and_not_while_they_fall(losses, given_up):
    history = [(10 * number, loss) for number, loss in enumerate(losses)]
    assert is_given_up(history, 10 * int(np.nanargmin(losses)), patience=3) == given_up
