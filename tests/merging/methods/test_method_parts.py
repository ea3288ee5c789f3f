"""Of every method with element or row grain: parts give the whole's bits, the order of models does not show."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlab.merging.methods import blocks, inner_products, magnitudes
from quantlab.merging.methods.method import (
    REQUIRED,
    check_parameters,
    merge_part,
    merge_tensor,
    parameters_of,
    survey_for,
)
from quantlab.merging.methods.noise import Noise
from quantlab.merging.methods.table import METHODS

PARTIAL = {name: method for name, method in METHODS.items() if method.grain != "tensor"}
SYMMETRIC = [name for name in PARTIAL if name not in ("passthrough", "slerp")]
DELTAS = [name for name, method in PARTIAL.items() if method.base == "required"]
CHOICES = {
    "weight": (1.0, 0.5, 0.3, 2.0),
    "scale": (1.0, 0.3),
    "density": (0.0, 1e-9, 0.2, 0.5, 0.8, 1.0),
    "gamma": (0.0, 0.01, 0.2, 1.0),
    "epsilon": (0.0, 0.1, 0.2),
    "lambda": (1.0, 0.7),
    "t": (0.0, 0.3, 1.0),
}
VALUES = st.sampled_from((0.0, 1.0, -1.0, 0.5, 3.0)) | st.floats(-100, 100, width=32)


def count_of(method):
    return method.models[1] or 3


def draw_parameters(draw, method):
    found = {}
    for name, parameter in parameters_of(method).items():
        if name in CHOICES:
            value = st.sampled_from(CHOICES[name])
        elif parameter.kind is bool:
            value = st.booleans()
        elif isinstance(parameter.kind, tuple):
            value = st.sampled_from(parameter.kind)
        else:
            continue
        found[name] = [draw(value) for _ in range(count_of(method))] if parameter.per_model else draw(value)
    return found


def usual(method, models):
    """Parameters that differ from model to model."""
    values = {"weight": (0.1, 0.7, 1 / 3), "density": (0.3, 0.5, 0.7), "gamma": (0.0, 0.1, 0.05), "t": 0.3}
    schema = parameters_of(method)
    return {
        name: list(value[:models]) if schema[name].per_model else value
        for name, value in values.items()
        if name in schema
    }


class Permuted:
    """Noise of models in another order."""

    def __init__(self, noise, order):
        self._noise, self._order = noise, order

    def part(self, offset):
        whole = self._noise.part(offset)
        return lambda model, first, last: whole(self._order[model], first, last)


def randoms(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def in_parts(method, base, tensors, parameters, cuts, noise, survey_cuts=None):
    """Survey, then merge, rows (or elements of a vector) from cut to cut."""
    bounds = list(itertools.pairwise([*cuts, len(base)]))
    survey = survey_for(method, parameters, len(tensors))
    for _ in range(0 if survey is None else survey.passes):
        for first, last in itertools.pairwise([*(survey_cuts or cuts), len(base)]):
            survey.add(base[first:last], [tensor[first:last] for tensor in tensors])
        survey.end_pass()
    columns = math.prod(base.shape[1:])
    return torch.cat(
        [
            merge_part(
                method,
                base[first:last],
                [tensor[first:last] for tensor in tensors],
                parameters,
                survey=None if survey is None else survey.result(),
                offset=first * columns,
                noise=noise,
            )
            for first, last in bounds
        ]
    )


@pytest.mark.parametrize("name", PARTIAL)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_parts_are_the_whole(name, data):
    method = PARTIAL[name]
    draw, models = data.draw, count_of(method)
    shape = draw(st.sampled_from([(1,), (9,), (5, 1), (1, 7), (6, 5)]))
    size = math.prod(shape)
    *tensors, base = (
        torch.tensor(draw(st.lists(VALUES, min_size=size, max_size=size))).reshape(shape) for _ in range(models + 1)
    )
    parameters = draw_parameters(draw, method)
    if "epsilon" in parameters and any(share not in (0, 0.2, 0.5, 0.8, 1) for share in parameters["density"]):
        parameters["density"] = [0.5] * models
    check_parameters(method, parameters, models)
    whole_only = method.grain == "row" and len(shape) == 1
    cuts = [0] if whole_only else [0, *sorted(draw(st.sets(st.integers(1, 8), max_size=3)) & set(range(1, shape[0])))]
    noise = Noise(0, "w")
    with pytest.MonkeyPatch.context() as patch:
        if draw(st.booleans()):  # lengths of runs that make even these tensors long
            patch.setattr(blocks, "ELEMENTS", draw(st.sampled_from([1, 4, 7])))
            patch.setattr(magnitudes, "RUN", 2)
            patch.setattr(inner_products, "RUN", 3)
        whole = merge_tensor(method, base, tensors, parameters, noise=noise)
        assert whole.dtype == torch.float32
        assert whole.shape == shape
        assert whole.isfinite().all()
        assert torch.equal(in_parts(method, base, tensors, parameters, cuts, noise), whole)
        assert torch.equal(in_parts(method, base, tensors, parameters, [0], noise, cuts), whole)


@pytest.mark.parametrize("name", PARTIAL)
def test_parts_of_a_long_tensor_are_the_whole(name):
    """Longer than what is worked on at once."""
    method, rows, columns = PARTIAL[name], 300, 311
    models = count_of(method)
    base = randoms(rows, columns)
    tensors = [(base + 0.01 * randoms(rows, columns, seed=i + 1)).bfloat16().float() for i in range(models)]
    parameters, noise = usual(method, models), Noise(1, "w")
    whole = merge_tensor(method, base, tensors, parameters, noise=noise)
    assert torch.equal(in_parts(method, base, tensors, parameters, [0, 7, 250], noise), whole)
    if method.base == "required":
        assert 0 < (whole - base).abs().max() < 0.5


@pytest.mark.parametrize("name", SYMMETRIC)
def test_the_order_of_models_does_not_show(name):
    method = PARTIAL[name]
    models = count_of(method)
    base = randoms(40, 50)
    tensors = [base + 0.1 * randoms(40, 50, seed=i + 1) for i in range(models)]
    parameters, noise = usual(method, models), Noise(1, "w")
    whole = merge_tensor(method, base, tensors, parameters, noise=noise)
    for order in itertools.permutations(range(models)):
        turned = {
            name: [value[i] for i in order] if isinstance(value, list) else value for name, value in parameters.items()
        }
        found = merge_tensor(method, base, [tensors[i] for i in order], turned, noise=Permuted(noise, order))
        assert torch.equal(found, whole)


def test_slerp_from_the_other_end_is_the_same():
    tensors = [randoms(40, 50, seed=i) for i in range(2)]
    one = merge_tensor(METHODS["slerp"], None, tensors, {"t": 0.25})
    assert torch.equal(merge_tensor(METHODS["slerp"], None, tensors[::-1], {"t": 0.75}), one)


def degenerate(method):
    """Every parameter at its ends, one at a time."""
    models, schema = count_of(method), parameters_of(method)
    usual = {name: 0.5 for name, parameter in schema.items() if parameter.default is REQUIRED}
    yield usual
    for name in schema:
        for value in CHOICES.get(name, ()):
            given = [value] * models if schema[name].per_model else value
            yield {**usual, **({"epsilon": [0.0] * models} if "epsilon" in schema else {}), name: given}


@pytest.mark.parametrize("name", PARTIAL)
def test_degenerate_parameters_have_a_result(name):
    method = PARTIAL[name]
    models, noise = count_of(method), Noise(0, "w")
    for shape in ((1,), (1, 1), (), (0, 3), (3, 4)):
        base = randoms(*shape)
        tensors = [base + randoms(*shape, seed=i + 1) for i in range(models)]
        for parameters in degenerate(method):
            found = merge_tensor(method, base, tensors, parameters, noise=noise)
            assert found.shape == shape
            assert found.isfinite().all()


@pytest.mark.parametrize("name", PARTIAL)
def test_equal_inputs_are_kept(name):
    """Where a row says so, bit for bit: callers copy bytes instead."""
    method = PARTIAL[name]
    models, values = count_of(method), randoms(7, 300) * 0.02
    for parameters in degenerate(method):
        if method.keeps_equal(parameters):
            found = merge_tensor(method, values, [values] * models, parameters, noise=Noise(0, "w"))
            assert torch.equal(found, values), parameters


@pytest.mark.parametrize("name", PARTIAL)
def test_inputs_are_not_changed(name):
    method = PARTIAL[name]
    models = count_of(method)
    base, *tensors = (randoms(3, 5, seed=i) for i in range(models + 1))
    before = [tensor.clone() for tensor in (base, *tensors)]
    merge_tensor(method, base, tensors, usual(method, models), noise=Noise(0, "w"))
    assert all(torch.equal(tensor, old) for tensor, old in zip((base, *tensors), before, strict=True))
