"""linear, task arithmetic and passthrough against numbers worked by hand."""

from __future__ import annotations

import itertools

import pytest
import torch

from quantlab.errors import InputError
from quantlab.merging.methods.method import merge_tensor
from quantlab.merging.methods.sums import linear, short, weighted_sum
from quantlab.merging.methods.table import METHODS


def merged(method, base, tensors, **parameters):
    given = {name.rstrip("_"): value for name, value in parameters.items()}
    base = None if base is None else torch.tensor(base)
    return merge_tensor(METHODS[method], base, [torch.tensor(values) for values in tensors], given).tolist()


def test_linear():
    # (1 * 1 + 3 * 3) / 4 = 2.5; (1 * 2 + 3 * 5) / 4 = 4.25
    assert merged("linear", None, [[1.0, 2.0], [3.0, 5.0]], weight=[1, 3]) == [2.5, 4.25]
    # 1 + 9; 2 + 15
    assert merged("linear", None, [[1.0, 2.0], [3.0, 5.0]], weight=[1, 3], normalize=False) == [10, 17]
    assert merged("linear", None, [[1.0, 2.0], [3.0, 5.0], [5.0, -1.0]]) == [3, 2]
    # A negative weight: (3 * 1 - 1 * 3) / 2 = 0; (3 * 2 - 5) / 2 = 0.5
    assert merged("linear", None, [[1.0, 2.0], [3.0, 5.0]], weight=[3, -1]) == [0, 0.5]


def test_linear_of_one_model_is_that_model():
    assert merged("linear", None, [[0.1, -7.0]], weight=[0.3]) == torch.tensor([0.1, -7.0]).tolist()


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "della", "nuslerp"])
def test_weights_that_cancel_are_refused(method):
    other = {} if method == "nuslerp" else {"normalize": True}
    with pytest.raises(InputError, match="add up to 0"):
        merged(method, [0.0], [[1.0], [2.0]], weight=[1, -1], **other)


def test_thirds_of_equal_models_are_the_model():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    for count in (2, 3, 5, 7):
        assert torch.equal(merge_tensor(METHODS["linear"], None, [values] * count, {}), values)


def test_task_arithmetic():
    base, tensors = [1.0, 2.0], [[2.0, 4.0], [0.0, 3.0]]
    # Differences (1, 2) and (-1, 1): 1 + 0.5 * (1 - 1), 2 + 0.5 * (2 + 1)
    assert merged("task_arithmetic", base, tensors, lambda_=0.5) == [1, 3.5]
    # 1 + 2 * 1 + 3 * -1, 2 + 2 * 2 + 3 * 1
    assert merged("task_arithmetic", base, tensors, weight=[2, 3]) == [0, 9]
    # Divided by 5: 1 - 1 / 5, 2 + 7 / 5
    assert merged("task_arithmetic", base, tensors, weight=[2, 3], normalize=True) == pytest.approx([0.8, 3.4])
    assert merged("task_arithmetic", base, tensors, lambda_=0.0) == base


def test_task_arithmetic_negates_and_makes_analogies():
    # 1 - 0.5 * 1, 2 - 0.5 * 2
    assert merged("task_arithmetic", [1.0, 2.0], [[2.0, 4.0]], weight=[-0.5]) == [0.5, 1]
    # base + a - b + c in differences: 1 + 1 - (-1) + 4, 2 + 2 - 1 + 0
    tensors = [[2.0, 4.0], [0.0, 3.0], [5.0, 2.0]]
    assert merged("task_arithmetic", [1.0, 2.0], tensors, weight=[1, -1, 1]) == [7, 3]


def test_differences_smaller_than_the_base_are_not_lost():
    # fp32's steps at 1 are 1.2e-7. The differences are multiples of it, and are halved: 1 + (3 - 1) / 2 steps.
    step = 2.0**-23
    assert merged("task_arithmetic", [1.0], [[1 + 3 * step], [1 - step]], lambda_=0.5) == [1 + step]


def test_passthrough():
    assert merged("passthrough", None, [[1.5, -2.0]]) == [1.5, -2.0]
    assert merged("passthrough", None, [[1.5, -2.0]], scale=[0.5]) == [0.75, -1]
    keeps = METHODS["passthrough"].keeps_equal
    assert keeps({})
    assert keeps({"scale": [1]})
    assert not keeps({"scale": [0.5]})


def test_linear_keeps_equal_models_if_its_weights_add_up_to_one():
    keeps = METHODS["linear"].keeps_equal
    assert keeps({"weight": [1, 7]})
    assert keeps({"weight": [0.1] * 10, "normalize": False})
    assert not keeps({"weight": [1, 7], "normalize": False})
    assert not keeps({"normalize": False})


def test_the_order_of_the_terms_does_not_show():
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(5000, generator=generator) for _ in range(4)]
    weights = [0.1, 0.7, -0.4, 1 / 3]  # of which sums often lie in the middle between two fp32 numbers
    whole = linear(None, tensors, weight=weights, normalize=False)
    exact = sum(tensor.double() * weight for tensor, weight in zip(tensors, weights, strict=True))
    # Rounded once to 24 bits, and 2^-30 of each term for its weight.
    terms = sum((tensor.double() * weight).abs() for tensor, weight in zip(tensors, weights, strict=True))
    assert ((whole.double() - exact).abs() <= exact.abs() * 2**-24 + terms * 2**-30).all()
    for order in itertools.permutations(range(4)):
        chosen = [tensors[i] for i in order]
        assert torch.equal(linear(None, chosen, weight=[weights[i] for i in order], normalize=False), whole)


def test_short_weights():
    assert short([1.0, -0.5, 0.0, 3e10]) == [1, -0.5, 0, 3e10]
    # 0.1 = 0x1.999999999999ap-4 has 53 bits; its first 29 are 0x1.9999999p-4, and the rest rounds up.
    assert short([0.1]) == [float.fromhex("0x1.999999ap-4")]


def test_no_tensor_is_too_small():
    assert weighted_sum([torch.empty(0, 3)], [1]).shape == (0, 3)
    assert weighted_sum([torch.tensor(2.0), torch.tensor(4.0)], [1, 0.5]).item() == 4
