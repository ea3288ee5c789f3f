"""WUDI: minimise interference with task vectors as stand-ins for inputs (Cheng et al. 2025, arXiv 2503.08099)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch

from quantlab.merging.methods.method import Between, PerModel, each
from quantlab.merging.methods.summed import mean_delta

MEAN_DECAY, SQUARE_DECAY, EPSILON = 0.9, 0.999, 1e-8  # Adam's own (Kingma and Ba 2014, arXiv 1412.6980)
PART = 256  # rows that go through all steps together


@torch.inference_mode()
def wudi(
    base: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    *,
    weight: PerModel = each(1.0),
    lambda_: float = 1.0,
    iterations: Annotated[int, Between(0)] = 300,
    learning_rate: Annotated[float, Between(0)] = 1e-5,
    as_matrix: bool = True,
) -> torch.Tensor:
    """base + lambda * tau, fp32 of base's shape, tau being what Adam makes of the deltas' sum in `iterations` steps on
    sum_i |(tau - tau_i) tau_i^T|^2 / |tau_i|^2.

    The gradient is 2 sum_i (tau - tau_i) A_i with A_i = tau_i^T tau_i / |tau_i|^2. It is computed as 2 (x A + C) for
    x = tau - sum_j tau_j, A = sum_i A_i and C = sum_i (sum_j tau_j - tau_i) A_i, so that a single model keeps its delta
    exactly; rows do not depend on each other. Models without a delta count for nothing (the authors' code divides by
    zero). Vectors get lambda times the mean of the deltas, as there.

    Args:
        weight: of each delta.
        iterations: the paper takes 300 to 400.
        as_matrix: False treats a matrix like a vector, as configs do by default with embeddings and heads.
    """
    if base.ndim != 2 or not as_matrix:
        return mean_delta(base, tensors, weight, lambda_)
    total = torch.zeros_like(base, dtype=torch.float32)
    for index, tensor in enumerate(tensors):
        total.add_(tensor - base, alpha=weight[index])
    curvature = torch.zeros(base.shape[1], base.shape[1])
    pull = torch.zeros_like(total)
    for index, tensor in enumerate(tensors):
        delta = (tensor - base).mul_(weight[index])
        norm = float(delta.square().sum(dtype=torch.float64))
        if norm == 0:
            continue
        own = (delta.T @ delta).div_(norm)
        curvature += own
        pull.addmm_(total - delta, own)
    out = total
    for start in range(0, len(base), PART):
        part = slice(start, start + PART)
        out[part] += _moved(pull[part], curvature, iterations, learning_rate)
    return out.mul_(lambda_).add_(base)


def _moved(pull: torch.Tensor, curvature: torch.Tensor, iterations: int, learning_rate: float) -> torch.Tensor:
    """x after so many steps of Adam from zero, its gradient being 2 (x curvature + pull); rows [part, in]."""
    moved, mean, square = (torch.zeros_like(pull) for _ in range(3))
    for step in range(1, iterations + 1):
        gradient = torch.addmm(pull, moved, curvature).mul_(2)
        mean.mul_(MEAN_DECAY).add_(gradient, alpha=1 - MEAN_DECAY)
        square.mul_(SQUARE_DECAY).addcmul_(gradient, gradient, value=1 - SQUARE_DECAY)
        root = (square / (1 - SQUARE_DECAY**step)).sqrt_().add_(EPSILON)
        moved.addcdiv_(mean, root, value=-learning_rate / (1 - MEAN_DECAY**step))
    return moved


def wudi_copies(shape: tuple[int, ...]) -> float:
    """The result, three of its size beside it, and squares of the input side."""
    return 4 + 3 * shape[1] / max(1, shape[0]) if len(shape) == 2 else 1
