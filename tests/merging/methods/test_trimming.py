"""TIES and breadcrumbs against numbers worked by hand, and with the parameters that have broken others."""

from __future__ import annotations

import pytest
import torch

from quantlab.merging.methods.method import merge_part, merge_tensor, survey_for
from quantlab.merging.methods.table import METHODS

TEN = [10.0, -8.0, 6.0, 4.0, -2.0, 1.0, 0.5, 0.25, 0.125, 0.0625]


def merged(method, deltas, *, base=1.0, **parameters):
    """The merged tensor less the base, which is `base` everywhere; all numbers in these tests are exact in fp32."""
    given = {name.rstrip("_"): value for name, value in parameters.items()}
    origin = torch.full((len(deltas[0]),), base)
    result = merge_tensor(METHODS[method], origin, [origin + torch.tensor(delta) for delta in deltas], given)
    return (result - origin).tolist()


def test_ties_trims_elects_and_averages_those_that_agree():
    first, second = [4.0, -1.0, 2.0, 0.5, 0.0], [-1.0, -3.0, 2.0, 0.0, 1.0]
    # int(0.4 * 5) = 2 are kept: (4, 0, 2, 0, 0) and (0, -3, 2, 0, 0). Signs of the sums: + - + + +.
    # Means of those that agree: 4 / 1, -3 / 1, (2 + 2) / 2.
    assert merged("ties", [first, second], density=[0.4, 0.4]) == [4, -3, 2, 0, 0]
    assert merged("ties", [first, second], density=[0.4, 0.4], lambda_=0.5) == [2, -1.5, 1, 0, 0]
    assert merged("ties", [first, second], density=[0.4, 0.4], normalize=False) == [4, -3, 4, 0, 0]


def test_ties_leaves_out_those_of_the_other_sign():
    first, second = [4.0, -1.0, 2.0], [-1.0, -3.0, -2.0]
    # Sums (3, -4, 0): + - +, 0 counts as plus. Those that agree: 4; -1 and -3; 2.
    assert merged("ties", [first, second]) == [4, -2, 2]
    assert merged("ties", [first, second], normalize=False) == [4, -4, 2]


def test_weights_count_in_the_election_and_in_the_mean():
    first, second = [4.0, -1.0, 2.0], [-1.0, -3.0, -2.0]
    # Weighted (4, -1, 2), (-3, -9, -6); sums (1, -10, -4): + - -. 4 / 1; (-1 - 9) / (1 + 3); -6 / 3.
    assert merged("ties", [first, second], weight=[1, 3]) == [4, -2.5, -2]
    assert merged("ties", [first, second], weight=[1, 3], normalize=False) == [4, -10, -6]
    # Equal weights cancel in the mean, not in the sum.
    assert merged("ties", [first, second], weight=[2, 2]) == [4, -2, 2]
    assert merged("ties", [first, second], weight=[2, 2], normalize=False) == [8, -8, 4]


def test_a_weight_of_nothing_takes_no_part():
    assert merged("ties", [[4.0, -1.0], [-9.0, 5.0]], weight=[1, 0]) == [4, -1]


def test_weights_of_both_signs_divide_by_their_sum():
    # Weighted by 3 and -1: (3, -3), (2, 1); sums (5, -2): + -. (3 + 2) / (3 - 1) = 2.5; -3 / 3 = -1.
    assert merged("ties", [[1.0, -1.0], [-2.0, -1.0]], weight=[3, -1]) == [2.5, -1]


def test_of_equal_magnitudes_the_first_are_kept():
    # int(0.5 * 4) = 2 of the three 2's.
    assert merged("ties", [[2.0, -2.0, 2.0, 1.0]], density=[0.5]) == [2, -2, 0, 0]


@pytest.mark.parametrize(
    ("density", "expected"),
    [(0, [0, 0, 0]), (1, [3, -1, 2]), (1.0, [3, -1, 2]), (1e-9, [3, 0, 0]), (0.34, [3, 0, 0]), (0.67, [3, 0, 2])],
)
def test_densities(density, expected):
    """int(density * 3), but one element at least unless the density is 0."""
    assert merged("ties", [[3.0, -1.0, 2.0]], density=[density]) == expected


def test_a_density_is_the_decimal_that_was_written():
    # 0.29 * 100 is 28.999999999999996 in binary.
    delta = [float(i + 1) for i in range(100)]
    assert sum(value > 0 for value in merged("ties", [delta], density=[0.29])) == 29


def test_the_global_trim():
    """The paper's: one threshold over all tensors, here 5, 4 | 3, 1, 0.5, 0.25 of which half are kept."""
    method, parameters = METHODS["ties"], {"density": [0.5], "trim": "model"}
    deltas = [torch.tensor([5.0, -4.0]), torch.tensor([3.0, 1.0, 0.5, 0.25])]
    assert method.scope(parameters) == "model"
    survey = survey_for(method, parameters, 1)
    for _ in range(survey.passes):
        for delta in deltas:
            survey.add(torch.zeros_like(delta), [delta])
        survey.end_pass()
    found = [
        merge_part(method, torch.zeros_like(delta), [delta], parameters, survey=survey.result()).tolist()
        for delta in deltas
    ]
    # int(0.5 * 6) = 3: 5, 4 and 3. By tensor it would be 5 of the first; 3 and 1 of the second.
    assert found == [[5, -4], [3, 0, 0, 0]]
    assert merged("ties", [[5.0, -4.0]], density=[0.5]) == [5, 0]
    assert merged("ties", [[3.0, 1.0, 0.5, 0.25]], density=[0.5]) == [3, 1, 0, 0]


def test_the_global_trim_keeps_all_that_equal_the_threshold():
    assert merged("ties", [[2.0, -2.0, 2.0, 1.0]], density=[0.25], trim="model") == [2, -2, 2, 0]


@pytest.mark.parametrize(
    ("density", "gamma", "expected"),
    [
        (0.3, 0.1, [0, -8, 6, 4, 0, 0, 0, 0, 0, 0]),  # int(0.1 * 10) = 1 at the top is out, int(0.3 * 10) = 3 kept
        (0.3, 0, [10, -8, 6, 0, 0, 0, 0, 0, 0, 0]),
        (0.9, 0.1, [0, *TEN[1:]]),
        (1, 0.1, [0, *TEN[1:]]),  # more than there is
        (1, 0, TEN),
        (1, 0.05, TEN),  # less than one element
        (0, 0.1, [0] * 10),
        (0.01, 0.2, [0, 0, 6, 0, 0, 0, 0, 0, 0, 0]),  # one at least
        (0.5, 1, [0] * 10),
    ],
)
@pytest.mark.parametrize("method", ["breadcrumbs", "breadcrumbs_ties"])
def test_breadcrumbs(method, density, gamma, expected):
    assert merged(method, [TEN], density=[density], gamma=[gamma]) == expected


def test_breadcrumbs_of_two_models():
    first, second = [8.0, 4.0, 2.0, 1.0], [-2.0, 1.0, 4.0, -8.0]
    # int(0.25 * 4) = 1 is out, int(0.5 * 4) = 2 of the rest are kept: (0, 4, 2, 0) and (-2, 0, 4, 0).
    half = {"density": [0.5, 0.5], "gamma": [0.25, 0.25]}
    assert merged("breadcrumbs", [first, second], **half) == [-2, 4, 6, 0]
    # 0 + 2 * -2, 3 * 4, 3 * 2 + 2 * 4; times 0.5
    assert merged("breadcrumbs", [first, second], weight=[3, 2], lambda_=0.5, **half) == [-2, 6, 7, 0]
    # With a gamma of 0 for the second: (0, 4, 2, 0) and (0, 0, 4, -8)
    assert merged("breadcrumbs", [first, second], density=[0.5, 0.5], gamma=[0.25, 0]) == [0, 4, 6, -8]
    third = [2.0, 1.0, -4.0, 8.0]  # keeps (2, 0, -4, 0)
    # Weighted 1, 2: (0, 4, 2, 0), (4, 0, -8, 0); sums + + - +: 4, 4, -8.
    assert merged("breadcrumbs_ties", [first, third], weight=[1, 2], **half) == [4, 4, -8, 0]
    assert merged("breadcrumbs_ties", [first, third], weight=[1, 2], normalize=True, **half) == [2, 4, -4, 0]


def test_the_ends_of_what_breadcrumbs_keeps_may_be_equal():
    # All magnitudes equal: the first is out at the top (int(0.25 * 4)), the next two are kept.
    assert merged("breadcrumbs", [[1.0, -1.0, 1.0, 1.0]], density=[0.5], gamma=[0.25]) == [0, -1, 1, 0]


def ties_by_sorting(base, tensors, weight, density):
    """The definition, in float64 and with a full sort, for weights and differences that make no ties."""
    rows = []
    for tensor, factor, share in zip(tensors, weight, density, strict=True):
        delta = (tensor - base).double()
        least = delta.abs().flatten().sort(descending=True).values[int(share * delta.numel()) - 1]
        rows.append(torch.where(delta.abs() >= least, delta, 0) * factor)
    stacked, factors = torch.stack(rows), torch.tensor(weight, dtype=torch.float64)
    agrees = stacked.sign() == torch.where(stacked.sum(0) >= 0, 1.0, -1.0)
    divisor = (agrees * factors[:, None, None]).sum(0)
    return base + (stacked * agrees).sum(0) / torch.where(divisor == 0, 1, divisor)


@pytest.mark.parametrize("weight", [[1.0, 1.0, 1.0], [0.3, 0.5, 0.9]])
def test_ties_of_random_tensors(weight):
    base, *tensors = (torch.randn(100, 300, generator=torch.Generator().manual_seed(seed)) for seed in range(4))
    density = [0.2, 0.5, 0.7]
    found = merge_tensor(METHODS["ties"], base, tensors, {"weight": weight, "density": density})
    expected = ties_by_sorting(base, tensors, weight, density)
    # Some roundings of fp32: of the differences times their weights, the sum, the quotient and the result.
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=8 * 2**-22)
    assert (found == base).float().mean() == pytest.approx((expected == base).float().mean(), abs=0)
