"""McNemar's test and Holm's correction, against values worked by hand."""

import math

import pytest

from quantlab.evaluation.paired_tests import holm, mcnemar


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),  # 2 x 1/2
        (5, 0, 2 / 32),
        (0, 6, 2 / 64),
        (10, 2, 2 * (1 + 12 + 66) / 4096),
        (2, 10, 2 * (1 + 12 + 66) / 4096),
        (3, 3, 1.0),  # twice the half and the middle is more than 1
        (8, 1, 2 * (1 + 9) / 512),
    ],
)
def test_few_questions_are_counted_exactly(only_a: int, only_b: int, p: float) -> None:
    assert mcnemar(only_a, only_b) == pytest.approx(p, rel=1e-12)


def test_many_questions_by_chi_squared() -> None:
    """(|600 - 500| - 1)^2 / 1100 = 8.91, near the exact value; equal counts are no difference."""
    exact = 2 * sum(math.comb(1100, count) for count in range(501)) / 2**1100
    assert mcnemar(600, 500) == pytest.approx(0.0028364, rel=1e-4)
    assert mcnemar(600, 500) == pytest.approx(exact, rel=0.01)
    assert mcnemar(550, 550) == 1.0
    assert mcnemar(501, 500) == 1.0
    assert 0 < mcnemar(5000, 2000) < 1e-200


def test_holms_correction() -> None:
    """The smallest times all, the next times one less, never below the one before, nor above 1; in the order given."""
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.001, 0.6]) == pytest.approx([1.0, 0.003, 1.0])
    assert holm([0.2]) == [0.2]
    assert holm([]) == []
