"""RegMean: the matrix whose outputs are nearest to every model's on that model's inputs (Jin et al. 2022, arXiv
2212.09849).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch

from quantlab.errors import InputError
from quantlab.merging.methods.method import Between, PerModel, each

PART = 1 << 22  # weights of the rows that are in float64 at a time
SMALLEST_RIDGE = 1e-12  # times the mean diagonal, where no damping was asked for and rounding asks for some
NonNegative = Annotated[PerModel, Between(0)]


@torch.inference_mode()
def regmean(
    base: torch.Tensor | None,
    tensors: Sequence[torch.Tensor],
    *,
    weight: NonNegative = each(1.0),
    off_diagonal: Annotated[float, Between(0, 1)] = 0.9,
    damping: Annotated[float, Between(0, 1)] = 1e-6,
    grams: Sequence[torch.Tensor | None] | None = None,
) -> torch.Tensor:
    """(sum_i W_i G_i) (sum_i G_i)^-1, fp32 [out, in], with the off-diagonal entries of every G_i times `off_diagonal`.

    G_i is model i's mean of x x^T over the inputs x of this weight, [in, in]: the paper's X^T X, but that a model with
    more calibration text does not count for more. To every G_i `damping` times the mean diagonal of all is added, times
    the identity, so that inputs which no model ever sees get the mean of the weights. Vectors, and matrices for which a
    G_i is missing, get the mean too, as in the paper.

    Args:
        weight: of each model's G_i, or in a mean.
        off_diagonal: the paper takes 0.9 to 0.95 (0.1 for T5).
        grams: per model, asked for one after the other; a sequence that reads them from files may be given.

    Raises:
        InputError: a G_i that is not [in, in], or not finite; weights that are all zero.
    """
    mean = _mean(tensors, weight)
    if grams is None or tensors[0].ndim != 2 or not mean.numel():
        return mean.to(torch.float32)
    total = torch.zeros(mean.shape[1], mean.shape[1], dtype=torch.float64)
    pull = torch.zeros_like(mean)  # sum of (W_i - mean) G_i: equal models stay as they are, to the bit
    for index, tensor in enumerate(tensors):
        gram = grams[index]
        if gram is None:
            return mean.to(torch.float32)
        if not weight[index]:
            continue
        reduced = _reduced(gram, mean.shape[1], off_diagonal).mul_(weight[index])
        total += reduced
        for rows in _parts(mean):
            pull[rows].addmm_(tensor[rows] - mean[rows], reduced)
        del gram, reduced
    size = float(total.diagonal().mean())
    if not size:
        return mean.to(torch.float32)
    factor = _factor(total, damping * size, size)
    out = torch.empty_like(tensors[0], dtype=torch.float32)
    for rows in _parts(mean):
        out[rows] = mean[rows] + torch.cholesky_solve(pull[rows].T, factor).T
    return out


def _mean(tensors: Sequence[torch.Tensor], weight: PerModel) -> torch.Tensor:
    """float64; equal tensors give themselves, whatever the weights."""
    total = sum(weight[index] for index in range(len(tensors)))
    if not total:
        raise InputError("regmean: all weights are zero; give at least one model a weight above 0")
    first = tensors[0].to(torch.float64)
    out = first.clone()
    for index in range(1, len(tensors)):
        out += (tensors[index] - first).mul_(weight[index] / total)
    return out


def _reduced(gram: torch.Tensor, columns: int, off_diagonal: float) -> torch.Tensor:
    """float64, a copy."""
    if tuple(gram.shape) != (columns, columns):
        raise InputError(f"regmean: second moments {list(gram.shape)} for {columns} inputs; they are another model's")
    reduced = gram.to(torch.float64, copy=True)
    if not bool(reduced.isfinite().all()):
        raise InputError("regmean: second moments hold NaN or infinity; collect the statistics again")
    diagonal = reduced.diagonal().clone()
    reduced *= off_diagonal
    reduced.diagonal().copy_(diagonal)
    return reduced


def _factor(total: torch.Tensor, ridge: float, size: float) -> torch.Tensor:
    """The Cholesky factor of total + ridge I; the ridge grows up to `size` where there is none."""
    while ridge <= size:
        total.diagonal().add_(ridge)
        factor, failed = torch.linalg.cholesky_ex(total)
        if not failed:
            return factor
        ridge = max(10 * ridge, SMALLEST_RIDGE * size)
    raise InputError("regmean: the second moments are not positive semidefinite; collect the statistics again")


def _parts(matrix: torch.Tensor) -> list[slice]:
    step = max(1, PART // matrix.shape[1])
    return [slice(start, start + step) for start in range(0, len(matrix), step)]


def regmean_copies(shape: tuple[int, ...]) -> float:
    """Three of the tensor's size in float64, the result, and squares of the input side: sum, one model's and factor."""
    return 7 + (6 * shape[1] / max(1, shape[0]) if len(shape) == 2 else 0)
