"""The k-th largest magnitude by counting is that of a stable sort, however the tensor comes in parts."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlab.merging.methods import magnitudes
from quantlab.merging.methods.magnitudes import MagnitudeSurvey
from quantlab.merging.methods.sparsifiers import keep_between, keep_largest

# Few values, so that many magnitudes are equal; some differ in their lower 16 bits alone.
VALUES = (0.0, -0.0, 1.0, -1.0, 1 + 2**-20, -1 - 2**-20, 1 + 2**-8, 2.0, 1e-40, -3e38)


def survey_of(values, ranks, cuts, **options):
    survey = MagnitudeSurvey(lambda model, size: ranks, **options)
    zeros = torch.zeros(len(values))
    for _ in range(survey.passes):
        for first, last in zip(cuts, [*cuts[1:], len(values)], strict=True):
            survey.add(zeros[first:last], [values[first:last]])
        survey.end_pass()
    return survey.result()[0]


def kept_by_sorting(values, count):
    """The first `count` of a stable sort by falling magnitude, the others 0."""
    order = sorted(range(len(values)), key=lambda i: -abs(values[i]))[:count]
    return [value if i in order else 0.0 for i, value in enumerate(values)]


def kept_by_survey(values, cutoff, cuts):
    found = []
    for first, last in zip(cuts, [*cuts[1:], len(values)], strict=True):
        part = values[first:last].clone()
        edge = cutoff.edge(lambda a, b, part=part: part[a:b].clone(), first, len(part))
        found += keep_largest(part, cutoff.magnitude, edge).tolist()
    return found


@settings(max_examples=80, deadline=None)
@given(
    values=st.lists(st.sampled_from(VALUES) | st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=40),
    count=st.integers(0, 41),
    cuts=st.sets(st.integers(1, 39), max_size=4),
    run=st.sampled_from([1, 3, 1 << 18]),
)
def test_the_largest_of_a_stable_sort(values, count, cuts, run):
    tensor = torch.tensor(values, dtype=torch.float32)
    values = tensor.tolist()
    cuts = [0, *sorted(cut for cut in cuts if cut < len(values))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(magnitudes, "RUN", run)
        (cutoff,) = survey_of(tensor, [count], cuts)
        assert kept_by_survey(tensor, cutoff, cuts) == kept_by_sorting(values, count)
        assert kept_by_survey(tensor, cutoff, [0]) == kept_by_sorting(values, count)


def test_several_ranks_of_a_long_tensor():
    generator = torch.Generator().manual_seed(0)
    values = (torch.randn(200_001, generator=generator) * 0.01).bfloat16().float()
    ranks = [1, 2000, 100_000, 200_000]
    cutoffs = survey_of(values, ranks, [0, 65_537, 170_000])
    order = values.abs().argsort(descending=True, stable=True)
    for rank, cutoff in zip(ranks, cutoffs, strict=True):
        expected = torch.zeros_like(values)
        expected[order[:rank]] = values[order[:rank]]
        assert cutoff.magnitude == values[order[rank - 1]].abs()
        assert kept_by_survey(values, cutoff, [0, 65_537, 170_000]) == expected.tolist()


def test_ties_may_all_be_kept():
    values = torch.tensor([2.0, -2.0, 1.0, 2.0])
    (cutoff,) = survey_of(values, [1], [0, 2], keeps_ties=True)
    assert kept_by_survey(values, cutoff, [0, 3]) == [2, -2, 0, 2]


def test_none_and_all():
    values = torch.tensor([3.0, 0.0])
    none, every = survey_of(values, [0, 2], [0])
    assert (none.magnitude, every.magnitude) == (math.inf, -1)
    assert kept_by_survey(values, none, [0]) == [0, 0]
    assert kept_by_survey(values, every, [0]) == [3, 0]


def test_what_lies_between_two_ranks():
    delta, room = torch.tensor([4.0, -3.0, 3.0, -2.0, 2.0, 1.0]), torch.empty(6)
    # Without the two largest (4 and the first 3), but with the four largest (to the first 2): 3 and -2 are left.
    assert keep_between(delta, (2.0, 4), (3.0, 2), room).tolist() == [0, 0, 3, -2, 0, 0]
