"""Statistics that cannot be used are refused by name."""

from __future__ import annotations

import pytest
import torch

from quantlab.errors import InputError
from quantlab.quantization.statistics import InputStatistics


def test_the_diagonal_is_that_of_the_second_moment():
    statistics = InputStatistics.of_second_moment(7, torch.tensor([[1.0, 0.5], [0.5, 4.0]]))
    assert statistics.diagonal.tolist() == [1, 4]
    assert statistics.columns == 2
    statistics.check(3, 2, "w")


def test_tiles_lie_along_the_diagonal():
    moment = torch.arange(64.0 * 64).reshape(64, 64)
    whole = InputStatistics.of_second_moment(7, moment)
    tiles = InputStatistics.of_tiles(7, torch.stack([moment[:32, :32], moment[32:, 32:]]))
    assert torch.equal(whole.known_tiles(), tiles.tiles)
    assert torch.equal(whole.diagonal, tiles.diagonal)
    assert InputStatistics(7, whole.diagonal).known_tiles() is None


@pytest.mark.parametrize(
    ("statistics", "fault"),
    [
        (InputStatistics(0, torch.ones(4)), "w: statistics of no tokens"),
        (InputStatistics(5, torch.ones(3)), r"w: statistics of shape \[3\] for 4 inputs"),
        (InputStatistics(5, torch.ones(4), torch.ones(4, 3)), r"w: statistics of shape \[4, 3\] for 4 inputs"),
        (
            InputStatistics(5, torch.ones(4), tiles=torch.ones(1, 4, 4)),
            r"w: statistics of shape \[1, 4, 4\] for 4 inputs",
        ),
        (InputStatistics(5, torch.tensor([1, float("nan"), 1, 1])), "w: statistics hold NaN or infinity"),
        (InputStatistics(5, torch.ones(4), torch.full((4, 4), float("inf"))), "w: statistics hold NaN or infinity"),
        (InputStatistics(5, torch.tensor([1.0, -1, 1, 1])), "w: statistics hold negative mean squares"),
    ],
)
def test_what_cannot_be_used_is_refused(statistics, fault):
    with pytest.raises(InputError, match=fault):
        statistics.check(3, 4, "w")
