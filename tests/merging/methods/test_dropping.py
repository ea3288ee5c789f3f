"""DARE and DELLA against numbers worked by hand, with numbers that are not random."""

from __future__ import annotations

import pytest
import torch

from quantlab.errors import InputError
from quantlab.merging.methods.method import merge_tensor
from quantlab.merging.methods.noise import Noise
from quantlab.merging.methods.sparsifiers import keep_by_rank
from quantlab.merging.methods.table import METHODS


class Given:
    """Noise that is known: by model, the tensor's numbers."""

    def __init__(self, *numbers):
        self._numbers = [torch.tensor(row) for row in numbers]

    def part(self, offset):
        return lambda model, first, last: self._numbers[model][offset + first : offset + last].clone()


def merged(method, deltas, noise, *, shape=(-1,), **parameters):
    """The merged tensor less a base of 1; all numbers in these tests are exact in fp32."""
    given = {name.rstrip("_"): value for name, value in parameters.items()}
    origin = torch.ones(len(deltas[0])).reshape(shape)
    tensors = [origin + torch.tensor(delta).reshape(shape) for delta in deltas]
    return (merge_tensor(METHODS[method], origin, tensors, given, noise=noise) - origin).flatten().tolist()


FIRST, SECOND = [1.0, 2.0, -3.0, 4.0], [-2.0, 1.0, 1.0, 1.0]
NOISE = Given([0.1, 0.6, 0.4, 0.9], [0.2, 0.1, 0.8, 0.25])


def test_dare_linear():
    # Under 0.5 and 0.25: (1, 0, -3, 0) / 0.5 and (-2, 1, 0, 0) / 0.25; 0.25 itself is not under 0.25.
    half = {"density": [0.5, 0.25]}
    assert merged("dare_linear", [FIRST, SECOND], NOISE, **half) == [-6, 4, -6, 0]
    assert merged("dare_linear", [FIRST, SECOND], NOISE, **half, rescale=False) == [-1, 1, -3, 0]
    # 2 * 2 - 8, 4, 2 * -6, 0; times 0.5
    assert merged("dare_linear", [FIRST, SECOND], NOISE, **half, weight=[2, 1], lambda_=0.5) == [-2, 2, -6, 0]
    # Divided by 2 + 2
    assert merged("dare_linear", [FIRST, SECOND], NOISE, **half, weight=[2, 2], normalize=True) == [-3, 2, -3, 0]


def test_dare_ties():
    # (2, 0, -6, 0) and (-8, 4, 0, 0): sums - + - +.
    half = {"density": [0.5, 0.25]}
    assert merged("dare_ties", [FIRST, SECOND], NOISE, **half) == [-8, 4, -6, 0]
    # (10, 0, -30, 0) and (-8, 4, 0, 0): sums + + - +; divided by 5, 1, 5.
    assert merged("dare_ties", [FIRST, SECOND], NOISE, **half, weight=[5, 1], normalize=True) == [2, 4, -6, 0]


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_densities_of_all_and_nothing(method):
    assert merged(method, [FIRST], NOISE, density=[1]) == FIRST
    assert merged(method, [FIRST], NOISE) == FIRST
    assert merged(method, [FIRST], NOISE, density=[0]) == [0, 0, 0, 0]


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_one_element(method):
    few = {"density": [0.25], "epsilon": [0.125]} if "della" in method else {"density": [0.25]}
    # One element of a row is kept with the density itself: 2 / 0.25.
    assert merged(method, [[2.0]], Given([0.24]), **few) == [8]
    assert merged(method, [[2.0]], Given([0.26]), **few) == [0]


def test_della_keeps_large_elements_rather_than_small_ones():
    # Magnitudes rank 2, 0, 1 in the row: kept with 0.75, 0.25, 0.5.
    # 0.7 < 0.75: 3 / 0.75; 0.3 > 0.25: 0; 0.4 < 0.5: 2 / 0.5
    row, noise = [3.0, -1.0, 2.0], Given([0.7, 0.3, 0.4])
    some = {"density": [0.5], "epsilon": [0.25]}
    assert merged("della_linear", [row], noise, **some) == [4, 0, 4]
    assert merged("della_linear", [row], noise, **some, rescale=False) == [3, 0, 2]
    assert merged("della", [row], noise, **some, lambda_=0.5) == [2, 0, 2]


def test_della_ranks_within_rows():
    # Rows (3, -1) and (1, 2), ranks (1, 0) and (0, 1), probabilities 0.75 and 0.25.
    noise = Given([0.7, 0.7, 0.7, 0.7])
    some = {"density": [0.5], "epsilon": [0.25]}
    assert merged("della_linear", [[3.0, -1.0, 1.0, 1.5]], noise, shape=(2, 2), **some) == [4, 0, 0, 2]


def test_della_elects():
    # (3, -1, 2) -> (4, 0, 4) as above, and (-6, 3, 1) -> -6 / 0.75, 3 / 0.5 and 1 / 0.25: sums - + +.
    noise = Given([0.7, 0.3, 0.4], [0.0, 0.0, 0.0])
    some = {"density": [0.5, 0.5], "epsilon": [0.25, 0.25]}
    assert merged("della", [[3.0, -1.0, 2.0], [-6.0, 3.0, 1.0]], noise, **some) == [-8, 6, 8]
    assert merged("della", [[3.0, -1.0, 2.0], [-6.0, 3.0, 1.0]], noise, **some, normalize=True) == [-8, 6, 4]
    assert merged("della_linear", [[3.0, -1.0, 2.0], [-6.0, 3.0, 1.0]], noise, **some) == [-4, 6, 8]


def test_a_probability_of_nothing_divides_nothing():
    # 0.5 - 0.5 = 0 for the smallest, 1 for the largest.
    found = keep_by_rank(torch.tensor([[1.0, 2.0]]), 0.5, 0.5, torch.tensor([[0.0, 0.99]]), True)
    assert found.tolist() == [[0, 2]]


def test_of_equal_magnitudes_the_first_counts_as_smaller():
    found = keep_by_rank(torch.ones(1, 3), 0.5, 0.25, torch.tensor([[0.3, 0.3, 0.3]]), False)
    assert found.tolist() == [[0, 1, 1]]


@pytest.mark.parametrize(("density", "epsilon"), [(0.1, 0.15), (0.9, 0.15)])
def test_probabilities_beyond_0_and_1_are_refused(density, epsilon):
    with pytest.raises(InputError, match=r"choose an epsilon of at most 0\.1"):
        merged("della", [FIRST], NOISE, density=[density], epsilon=[epsilon])


@pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
def test_the_mean_is_kept(method):
    """What is dropped is made up for by what is divided: of 40000 ones the mean is 1 within six standard errors."""
    base = torch.zeros(40, 1000)
    found = merge_tensor(METHODS[method], base, [base + 1], {"density": [0.3]}, noise=Noise(0, "w"))
    # A kept one counts 1 / 0.3 (della: 1 / 0.15 at most); variance 0.7 / 0.3 (0.85 / 0.15), / 40000: 0.0076 (0.012)
    assert abs(found.double().mean().item() - 1) < 6 * (0.0076 if method == "dare_linear" else 0.012)
    share = (found > 0).double().mean().item()
    assert abs(share - 0.3) < 0.015
