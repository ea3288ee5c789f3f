"""Means on a sphere: slerp, nuslerp and the Karcher mean.

All of them give weighted sums of the models whose weights follow from the models' inner products, so one survey of
these in float64 is enough; the sum itself can be taken element by element.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import torch

from quantlab.errors import InputError
from quantlab.merging.methods.blocks import runs
from quantlab.merging.methods.inner_products import (
    ColumnGramSurvey,
    Doubles,
    GramSurvey,
    NoSurvey,
    matrix_of,
    row_grams,
)
from quantlab.merging.methods.method import Between, PerModel, Share, Survey, each
from quantlab.merging.methods.sums import normalized, weighted_sum

SMALL_SINE = 1e-5  # of an angle so close to 0 or pi that a great circle through both vectors is not determined


def slerp(base: torch.Tensor | None, tensors: Sequence[torch.Tensor], *, t: Share, survey: Doubles) -> torch.Tensor:
    """Spherical interpolation (Shoemake 1985) from the first model (t = 0) to the second (t = 1), as flat vectors.

    The great circle's coefficients are applied to the vectors as they are, so their lengths are interpolated too.
    Where the vectors are parallel, opposite or 0 no great circle is determined: the result is the straight line's.
    (mergekit takes the straight line from a cosine of 0.9995 on: the results differ there by some 1e-5 of the weights.)
    """
    return weighted_sum(tensors, [float(value) for value in great_circle(survey, np.float64(t))])


def slerp_survey() -> Survey:
    """The inner products of both models."""
    return GramSurvey(from_base=False)


def great_circle(gram: Doubles, t: Any) -> tuple[Doubles, Doubles]:
    """The weights of two vectors whose inner products are `gram` [2, 2, ...], at `t` between them: arrays [...]."""
    t = np.asarray(t, np.float64)
    lengths = np.sqrt(gram[0, 0] * gram[1, 1])
    cosine = np.clip(np.divide(gram[0, 1], lengths, out=np.ones_like(lengths), where=lengths > 0), -1, 1)
    angle = np.arccos(cosine)
    sine = np.sin(angle)
    is_round = sine > SMALL_SINE
    divisor = np.where(is_round, sine, 1)
    first = np.where(is_round, np.sin((1 - t) * angle) / divisor, 1 - t)
    second = np.where(is_round, np.sin(t * angle) / divisor, t)
    return first, second


def nuslerp(
    base: torch.Tensor | None,
    tensors: Sequence[torch.Tensor],
    *,
    weight: PerModel = each(1.0),
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
    survey: Doubles | None,
) -> torch.Tensor:
    """Spherical interpolation of two models at weight[1] / (weight[0] + weight[1]).

    If there is a base, their fp32 differences from it are interpolated and added to it. A whole tensor is one vector,
    or else each column of a matrix is (each row if `nuslerp_row_wise`); a tensor that is no matrix is always one. Named
    after mergekit's method.
    """
    t = normalized(weight)[1]
    if nuslerp_flatten:
        assert survey is not None
        first, second = (float(value) for value in great_circle(survey, t))
        if base is None:
            return weighted_sum(tensors, [first, second])
        return weighted_sum([base, *tensors], [1 - first - second, first, second])
    if nuslerp_row_wise or tensors[0].ndim != 2:
        return _scaled_sum(base, tensors, [share[:, None] for share in great_circle(row_grams(base, tensors), t)])
    assert survey is not None
    return _scaled_sum(base, tensors, [share[None, :] for share in great_circle(survey, t)])


def nuslerp_survey(nuslerp_flatten: bool, nuslerp_row_wise: bool) -> Survey:
    """The inner products that this way of cutting a tensor into vectors needs."""
    if nuslerp_flatten:
        return GramSurvey(from_base=True)
    return NoSurvey() if nuslerp_row_wise else ColumnGramSurvey(from_base=True)


def check_nuslerp(weight: PerModel) -> None:
    """Raise InputError where the weights put the result outside of the arc between the models."""
    t = normalized(weight)[1]
    if not 0 <= t <= 1:
        raise InputError(f"parameter 'weight': {list(weight)} have different signs: there is no place between models")


def _scaled_sum(base: torch.Tensor | None, tensors: Sequence[torch.Tensor], factors: Sequence[Doubles]) -> torch.Tensor:
    """The sum of tensors times factors of their rows or columns; of their differences from the base if there is one."""
    origin, matrices = None if base is None else matrix_of(base), [matrix_of(tensor) for tensor in tensors]
    out = np.empty_like(matrices[0])
    columns = out.shape[1]
    wide = [np.broadcast_to(factor, out.shape) for factor in factors]
    for first, last in runs(out.size, columns):
        here = slice(first // max(1, columns), last // max(1, columns))
        total = np.zeros((here.stop - here.start, columns))
        for matrix, factor in zip(matrices, wide, strict=True):
            total += (matrix[here] if origin is None else matrix[here] - origin[here]) * factor[here]
        out[here] = total if origin is None else np.add(total, origin[here], out=total)
    return torch.from_numpy(out.reshape(tensors[0].shape))


def karcher(
    base: torch.Tensor | None,
    tensors: Sequence[torch.Tensor],
    *,
    max_iter: Annotated[int, Between(least=0)] = 10,
    tol: Annotated[float, Between(least=0)] = 1e-5,
    survey: Doubles,
) -> torch.Tensor:
    """The Karcher (Riemannian) mean of the models' directions (Grove and Karcher 1973), times their mean length.

    Starting from the direction of the unit vectors' sum, the mean of their logarithms is followed until it is shorter
    than `tol`, `max_iter` times at most. Vectors that are 0 have no direction, but count in the mean length; where the
    unit vectors cancel, the first one is the start; a vector opposite to the mean has no logarithm and is left out of
    that step.
    """
    return weighted_sum(tensors, karcher_weights(survey, max_iter, tol))


def karcher_survey() -> Survey:
    """The inner products of all models."""
    return GramSurvey(from_base=False)


def karcher_weights(gram: Doubles, max_iter: int, tol: float) -> list[float]:
    """The mean as weights of vectors with these inner products [models, models]."""
    lengths = np.sqrt(np.diagonal(gram))
    has_direction = lengths > 0
    count = int(has_direction.sum())
    if count == 0:
        return [0.0] * len(lengths)
    inverse = np.divide(1, lengths, out=np.zeros_like(lengths), where=has_direction)
    unit = gram * inverse[:, None] * inverse  # inner products of the unit vectors
    mean = _direction(unit, has_direction / count)
    if mean is None:
        mean = np.eye(len(lengths))[int(np.argmax(has_direction))]
    for _ in range(max_iter):
        cosine = np.clip(unit @ mean, -1, 1)
        angle = np.arccos(cosine)
        sine = np.sin(angle)
        ratio = np.divide(angle, sine, out=np.where(cosine > 0, 1.0, 0.0), where=sine > SMALL_SINE)
        ratio = ratio * has_direction / count
        step = ratio - (ratio @ cosine) * mean  # the mean of the logarithms
        length = math.sqrt(max(0.0, float(step @ unit @ step)))
        if length < tol or length == 0:
            break
        moved = _direction(unit, math.cos(length) * mean + math.sin(length) / length * step)
        if moved is None:
            break
        mean = moved
    return [float(value) for value in mean * inverse * lengths.mean()]


def _direction(unit: Doubles, weights: Doubles) -> Doubles | None:
    """Weights of the unit vectors, scaled so that their sum has length 1; None where it has none."""
    squared = float(weights @ unit @ weights)
    return weights / math.sqrt(squared) if squared > SMALL_SINE**2 else None
