"""Model Stock against angles worked by hand."""

from __future__ import annotations

import pytest
import torch

from quantlab.merging.methods.method import merge_tensor
from quantlab.merging.methods.table import METHODS


def merged(tensors, base, **parameters):
    tensors = [torch.tensor(values) for values in tensors]
    return merge_tensor(METHODS["model_stock"], torch.tensor(base), tensors, parameters)


def close(found, expected):
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("filter_wise", [False, True])
def test_two_models(filter_wise):
    # Differences (1, 0) and (1, 1): cos = 0.7071068, t = 2 cos / (1 + cos) = 0.8284271; their mean is (1, 0.5).
    close(merged([[2.0, -1.0], [2.0, 0.0]], [1.0, -1.0], filter_wise=filter_wise), [1.8284271, -0.5857864])


def test_three_models():
    # Cosines 0, 0.7071068 and 0.7071068: 0.4714045 on average; t = 1.4142136 / 1.9428090 = 0.7279221 of 2 / 3.
    close(merged([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], [0.0, 0.0]), [0.4852814, 0.4852814])


def test_by_rows():
    first, second = [[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]], [[1.0, 1.0], [-1.0, 0.0], [0.0, 2.0]]
    base = torch.zeros(3, 2).tolist()
    # The first row as above. Opposite, and a difference of 0: nothing to go by, the base.
    close(merged([first, second], base, filter_wise=True), [[0.8284271, 0.4142136], [0.0, 0.0], [0.0, 0.0]])
    # As one vector: 1 - 1 = 0 is the inner product.
    assert merged([first, second], base).tolist() == base


def test_equal_models_are_kept():
    assert merged([[3.0, 4.0]] * 4, [1.0, 1.0]).tolist() == [3, 4]
    assert merged([[1.0, 1.0]] * 4, [1.0, 1.0]).tolist() == [1, 1]


@pytest.mark.parametrize("filter_wise", [False, True])
def test_one_element(filter_wise):
    # Differences 1 and 3 point the same way: t = 1, their mean 2. Then opposite ones.
    assert merged([[2.0], [4.0]], [1.0], filter_wise=filter_wise).tolist() == [3]
    assert merged([[2.0], [0.0]], [1.0], filter_wise=filter_wise).tolist() == [1]
