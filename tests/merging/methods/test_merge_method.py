"""A method's signature is its schema, wrong parameters are named, and noise depends on places alone."""

from __future__ import annotations

from typing import Annotated, Literal

import pytest
import torch

from quantlab.errors import InputError
from quantlab.merging.methods.method import (
    REQUIRED,
    Between,
    MergeMethod,
    Parameter,
    PerModel,
    arguments_of,
    check_parameters,
    each,
    merge_tensor,
    parameters_of,
    survey_for,
)
from quantlab.merging.methods.noise import Noise
from quantlab.merging.methods.table import METHODS

THREE = [torch.tensor([float(value)]) for value in (1, 2, 3)]


def everything(
    base,
    tensors,
    *,
    weight: PerModel,
    share: Annotated[PerModel, Between(0, 1)] = each(0.5),
    lambda_: float = 2.0,
    rounds: Annotated[int, Between(least=1)] = 3,
    flag: bool = False,
    kind: Literal["a", "b"] = "a",
    survey=None,
    offset=0,
    noise=None,
    grams=None,
):
    return tensors[0]


EVERYTHING = MergeMethod(everything, grain="element", base="unused", models=(1, 3), source="", workspace=1)


def test_the_signature_is_the_schema():
    assert list(parameters_of(EVERYTHING).values()) == [
        Parameter("weight", True, float, REQUIRED),
        Parameter("share", True, float, 0.5, Between(0, 1)),
        Parameter("lambda", False, float, 2.0),
        Parameter("rounds", False, int, 3, Between(1)),
        Parameter("flag", False, bool, False),
        Parameter("kind", False, ("a", "b"), "a"),
    ]


def test_defaults_of_models_become_one_value_each():
    assert arguments_of(EVERYTHING, {"weight": [1, 2], "lambda": 5}, 2) == {
        "weight": (1, 2),
        "share": (0.5, 0.5),
        "lambda_": 5,
        "rounds": 3,
        "flag": False,
        "kind": "a",
    }


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({}, "'weight' is missing"),
        ({"weight": [1, 1], "shaer": [1, 1]}, "did you mean 'share'"),
        ({"weight": [1, 1], "zzz": 1}, "it has: weight, share, lambda, rounds, flag, kind"),
        ({"weight": 1}, "not one number for each of 2 models"),
        ({"weight": [1]}, "not one number for each of 2 models"),
        ({"weight": [1, "1"]}, "'1' is not a finite number"),
        ({"weight": [1, True]}, "True is not a finite number"),
        ({"weight": [1, float("inf")]}, "inf is not a finite number"),
        ({"weight": [1, 1], "share": [0, 1.5]}, "1.5 is out of range; it is from 0 to 1"),
        ({"weight": [1, 1], "rounds": 0}, "0 is out of range; it is at least 1"),
        ({"weight": [1, 1], "rounds": 1.5}, "1.5 is not a whole number"),
        ({"weight": [1, 1], "flag": 1}, "1 is neither true nor false"),
        ({"weight": [1, 1], "kind": "c"}, "'c' is none of a, b"),
    ],
)
def test_a_wrong_parameter_is_named(parameters, message):
    with pytest.raises(InputError) as error:
        check_parameters(EVERYTHING, parameters, 2)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("method", "models", "message"),
    [("slerp", 1, "takes 2,"), ("passthrough", 2, "takes 1,"), ("model_stock", 1, "takes 2 or more,")],
)
def test_too_few_or_too_many_models(method, models, message):
    with pytest.raises(InputError, match="base not counted") as error:
        merge_tensor(METHODS[method], THREE[0], THREE[:models], {"t": 0.5} if method == "slerp" else {})
    assert message in str(error.value)


def test_a_missing_base_is_named():
    with pytest.raises(InputError, match="base_model"):
        merge_tensor(METHODS["ties"], None, THREE, {})


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_row_can_be_used(method):
    """Its parameters have kinds, and survey and check name only parameters that it has."""
    schema = parameters_of(method)
    models = method.models[1] or 3
    given = {name: 0.5 for name, parameter in schema.items() if parameter.default is REQUIRED}
    check_parameters(method, given, models)
    survey = survey_for(method, given, models)
    assert (survey is None) == (method.survey is None)
    assert method.scope(given) == "tensor"
    assert method.keeps_equal(given) in (True, False)


def test_noise_is_a_function_of_places():
    noise = Noise(3, "layer.weight")
    whole = noise.uniform(1, 100)
    for first in (0, 1, 7, 8, 13, 33):
        for last in (first, first + 9, 50, 100):
            assert torch.equal(noise.uniform(1, last - first, first), whole[first:last])
            assert torch.equal(noise.part(first)(1, 2, 9), whole[first + 2 : first + 9])


def test_noise_differs_by_seed_tensor_and_model():
    found = [Noise(seed, name).uniform(model, 64) for seed in (0, 1) for name in "ab" for model in (0, 1)]
    assert len({tuple(numbers.tolist()) for numbers in found}) == 8


def test_noise_is_uniform():
    numbers = Noise(0, "w").uniform(0, 100_000).double()
    assert 0 <= numbers.min() < 1e-4
    assert 1 - 1e-4 < numbers.max() < 1
    # Standard errors: of the mean 0.289 / 316 = 0.0009, of the tenths' counts sqrt(9000) = 95.
    assert abs(numbers.mean() - 0.5) < 0.004
    counts = torch.histc(numbers, 10, 0, 1)
    assert (counts - 10_000).abs().max() < 400


def test_noise_is_stable():
    """These very numbers, so that a seed means the same merge tomorrow."""
    assert Noise(0, "w").uniform(0, 3, 5).mul(2**24).tolist() == [12282676, 1271602, 11064647]
