"""slerp, nuslerp and the Karcher mean against angles worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from quantlab.errors import InputError
from quantlab.merging.methods.inner_products import GramSurvey
from quantlab.merging.methods.method import merge_tensor
from quantlab.merging.methods.table import METHODS


def merged(method, tensors, base=None, **parameters):
    base = None if base is None else torch.tensor(base)
    return merge_tensor(METHODS[method], base, [torch.tensor(values) for values in tensors], parameters)


def close(found, expected):
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32), rtol=1e-6, atol=1e-6)


def test_slerp():
    # A right angle: sin(60) = 0.8660254 of the first and sin(30) = 0.5 of the second, at their lengths.
    close(merged("slerp", [[3.0, 0.0], [0.0, 4.0]], t=1 / 3), [2.5980762, 2.0])
    # 120 degrees: sin(60) / sin(120) = 1 of each.
    close(merged("slerp", [[1.0, 0.0], [-0.5, math.sqrt(0.75)]], t=0.5), [0.5, 0.8660254])
    assert merged("slerp", [[3.0, 1.0], [0.0, 4.0]], t=0).tolist() == [3, 1]
    assert merged("slerp", [[3.0, 1.0], [0.0, 4.0]], t=1.0).tolist() == [0, 4]


def test_slerp_where_no_great_circle_is_determined():
    assert merged("slerp", [[3.0, 4.0], [3.0, 4.0]], t=0.3).tolist() == [3, 4]
    assert merged("slerp", [[3.0, 4.0], [6.0, 8.0]], t=0.5).tolist() == [4.5, 6]
    # Opposite: 0.75 * (3, 4) + 0.25 * (-3, -4)
    assert merged("slerp", [[3.0, 4.0], [-3.0, -4.0]], t=0.25).tolist() == [1.5, 2]
    assert merged("slerp", [[0.0, 0.0], [2.0, 4.0]], t=0.5).tolist() == [1, 2]
    assert merged("slerp", [[0.0], [0.0]], t=0.5).tolist() == [0]
    assert merged("slerp", [[2.0], [-3.0]], t=0.5).tolist() == [-0.5]


def test_slerp_of_vectors_that_are_nearly_parallel():
    """The great circle's coefficients tend to the line's: at 0.01 rad they differ by t (1 - t) (1 + t) / 6 * 0.0001."""
    found = merged("slerp", [[1.0, 0.0], [math.cos(0.01), math.sin(0.01)]], t=0.5)
    close(found, [math.cos(0.005), math.sin(0.005)])


@pytest.mark.parametrize("t", [-0.1, 1.5, float("nan")])
def test_a_place_beyond_the_ends_is_refused(t):
    with pytest.raises(InputError, match="'t'"):
        merged("slerp", [[1.0], [2.0]], t=t)


def test_slerp_needs_a_place():
    with pytest.raises(InputError, match="'t' is missing"):
        merged("slerp", [[1.0], [2.0]])


def test_nuslerp_is_slerp_at_the_second_models_share():
    close(merged("nuslerp", [[3.0, 0.0], [0.0, 4.0]], weight=[2, 1]), [2.5980762, 2.0])
    # Matrices are vectors, as long as they are flattened.
    close(merged("nuslerp", [[[3.0], [0.0]], [[0.0], [4.0]]], weight=[4, 2]), [[2.5980762], [2.0]])


def test_nuslerp_of_differences():
    close(merged("nuslerp", [[4.0, 1.0], [1.0, 5.0]], [1.0, 1.0], weight=[2, 1]), [3.5980762, 3.0])
    # Only one differs: no angle, the line's middle.
    assert merged("nuslerp", [[4.0, 1.0], [1.0, 1.0]], [1.0, 1.0]).tolist() == [2.5, 1]


FIRST, SECOND = [[3.0, 0.0], [0.0, 2.0]], [[0.0, 4.0], [0.0, 2.0]]


@pytest.mark.parametrize("base", [None, [[1.0, -1.0], [2.0, 0.0]]])
def test_nuslerp_by_rows_and_columns(base):
    origin = torch.zeros(2, 2) if base is None else torch.tensor(base)
    tensors = [(torch.tensor(matrix) + origin).tolist() for matrix in (FIRST, SECOND)]
    rows = merged("nuslerp", tensors, base, weight=[2, 1], nuslerp_flatten=False, nuslerp_row_wise=True)
    # The first row as above; the second is the same in both.
    close(rows - origin, [[2.5980762, 2.0], [0.0, 2.0]])
    columns = merged("nuslerp", tensors, base, nuslerp_flatten=False)
    # First columns (3, 0) and (0, 0): half of each.
    # Second ones (0, 2) and (4, 2): cos = 4 / (2 * sqrt(20)) = 0.4472136,
    # and sin(x / 2) / sin(x) = 1 / (2 cos(x / 2)) = 1 / sqrt(2 * 1.4472136) = 0.5877853 of (0 + 4, 2 + 2).
    close(columns - origin, [[1.5, 2.3511410], [0.0, 2.3511410]])


@pytest.mark.parametrize("row_wise", [False, True])
def test_a_vector_is_one_vector(row_wise):
    options = {"nuslerp_flatten": False, "nuslerp_row_wise": row_wise}
    close(merged("nuslerp", [[3.0, 0.0], [0.0, 4.0]], weight=[2, 1], **options), [2.5980762, 2.0])


def test_nuslerp_refuses_places_beyond_the_ends():
    with pytest.raises(InputError, match="different signs"):
        merged("nuslerp", [[1.0], [2.0]], weight=[3, -1])


def test_karcher():
    # Halfway between 0 and 90 degrees, lengths 1 and 3: 2 * (cos 45, sin 45).
    close(merged("karcher", [[1.0, 0.0], [0.0, 3.0]]), [1.4142136, 1.4142136])
    # On a circle the mean angle: (0 + 90 + 90) / 3 = 60 degrees; their sum's is 63.4.
    close(merged("karcher", [[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]), [0.5, 0.8660254])
    close(merged("karcher", [[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]], max_iter=0), [1 / math.sqrt(5), 2 / math.sqrt(5)])
    # Three axes of space: their sum's direction, which is all three's mean at once.
    axes = [[2.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 2.0]]
    close(merged("karcher", axes), [2 / math.sqrt(3)] * 3)


def test_karcher_without_a_mean_of_directions():
    assert merged("karcher", [[3.0, 4.0]] * 3).tolist() == [3, 4]
    close(merged("karcher", [[3.0, 4.0]]), [3.0, 4.0])
    # Opposite: the first one's direction, times the mean length.
    close(merged("karcher", [[3.0, 4.0], [-6.0, -8.0]]), [4.5, 6.0])
    # 0 has no direction, but a length of 0.
    close(merged("karcher", [[0.0, 0.0], [3.0, 4.0]]), [1.5, 2.0])
    assert merged("karcher", [[0.0], [0.0]]).tolist() == [0]
    close(merged("karcher", [[2.0], [4.0]]), [3.0])


def test_inner_products_are_the_same_bits_in_all_parts():
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(20_000, generator=generator) for _ in range(3)]
    base = torch.randn(20_000, generator=generator)
    for origin, from_base in ((None, False), (base, False), (base, True)):
        found = []
        for cuts in ([0], [0, 1], [0, 4095, 4097, 12_288], [0, 19_999], range(0, 20_000, 1313)):
            survey = GramSurvey(from_base=from_base)
            for first, last in zip(cuts, [*cuts[1:], 20_000], strict=True):
                part = None if origin is None else origin[first:last]
                survey.add(part, [tensor[first:last] for tensor in tensors])
            survey.end_pass()
            found.append(survey.result())
        for other in found[1:]:
            np.testing.assert_array_equal(other, found[0])
        wide = torch.stack([tensor - base if from_base else tensor for tensor in tensors]).double()
        np.testing.assert_allclose(found[0], (wide @ wide.T).numpy(), rtol=1e-12, atol=1e-9)
