"""Weighted sums of models: linear, task arithmetic, passthrough, and the sum that others end in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from quantlab.errors import InputError
from quantlab.merging.methods.blocks import flat, longest, runs
from quantlab.merging.methods.method import PerModel, each


def weighted_sum(tensors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """The sum of weights[i] * tensors[i], fp32, of fp32 tensors of one shape.

    It is summed in float64 and rounded once, so weights that add up to 1 return equal tensors as they are. With weights
    from `short` the order of the terms hardly ever shows: in the last bit of an element whose sum lies within some
    2^-52 of its largest term from the middle between two fp32 numbers.
    """
    out = torch.empty_like(tensors[0], memory_format=torch.contiguous_format)
    whole, parts = flat(out), [flat(tensor) for tensor in tensors]
    bounds = list(runs(len(whole)))
    room = torch.empty((2, longest(bounds)), dtype=torch.float64)
    for first, last in bounds:
        total, term = room[:, : last - first]
        total.copy_(parts[0][first:last]).mul_(weights[0])
        for part, weight in zip(parts[1:], weights[1:], strict=True):
            total.add_(term.copy_(part[first:last]).mul_(weight))  # add_'s alpha may or may not fuse: bits would vary
        whole[first:last] = total
    return out


def short(weights: Sequence[float]) -> list[float]:
    """Weights rounded to 29 bits, so that their products with fp32 numbers (24 bits) are exact in float64.

    That is 1/64 of fp32's own rounding. And of weights such as 1/10 and 1/3 the sums of fp32 numbers would often lie
    exactly in the middle between two fp32 numbers, where the order of the terms decides: those of these weights do not.
    """
    return [math.ldexp(round(math.ldexp(part, 29)), power - 29) for part, power in map(math.frexp, weights)]


def linear(
    base: torch.Tensor | None,
    tensors: Sequence[torch.Tensor],
    *,
    weight: PerModel = each(1.0),
    normalize: bool = True,
) -> torch.Tensor:
    """The weighted average of the models (model soups, arXiv 2203.05482); a sum if `normalize` is false."""
    return weighted_sum(tensors, short(normalized(weight) if normalize else weight))


def linear_keeps_equal(parameters: Mapping[str, Any]) -> bool:
    """Whether the weights add up to 1."""
    return bool(parameters.get("normalize", True)) or math.isclose(math.fsum(parameters.get("weight", ())), 1)


def task_arithmetic(
    base: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    *,
    weight: PerModel = each(1.0),
    lambda_: float = 1.0,
    normalize: bool = False,
) -> torch.Tensor:
    """base + lambda * sum of weight * (model - base) (arXiv 2212.04089).

    Negative weights forget; weights 1, -1, 1 of a, b, c make the analogy base + a - b + c (in differences). The
    differences need no rounding of their own: the sum is taken of base and models with the weights that it has on them.
    """
    shares = short([lambda_ * share for share in (normalized(weight) if normalize else weight)])
    return weighted_sum([base, *tensors], [1 - math.fsum(shares), *shares])


def passthrough(
    base: torch.Tensor | None, tensors: Sequence[torch.Tensor], *, scale: PerModel = each(1.0)
) -> torch.Tensor:
    """The one model's tensor, times `scale`: for layers put together anew."""
    return tensors[0] * scale[0]


def passthrough_keeps_equal(parameters: Mapping[str, Any]) -> bool:
    """Whether nothing is scaled."""
    return all(scale == 1 for scale in parameters.get("scale", ()))


def normalized(weight: Sequence[float]) -> list[float]:
    """Weights divided by their sum.

    Raises:
        InputError: they add up to nothing.
    """
    total = math.fsum(weight)
    if abs(total) <= 1e-8 * max((abs(value) for value in weight), default=0.0):
        raise InputError(f"parameter 'weight': {list(weight)} add up to 0, so normalize: true cannot divide by them")
    return [value / total for value in weight]


def check_weights(weight: PerModel, normalize: bool) -> None:
    """Raise InputError where weights are to be normalized and add up to nothing."""
    if normalize:
        normalized(weight)
