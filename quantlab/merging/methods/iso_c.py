"""Iso-C: isotropic merging in the common subspace (Marczak et al. 2025, arXiv 2502.04959)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from quantlab.adapters.truncated_svd import negligible
from quantlab.merging.methods.method import PerModel, each
from quantlab.merging.methods.summed import Deltas, eigenvectors, mean_delta


@torch.inference_mode()
def iso_c(
    base: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    *,
    weight: PerModel = each(1.0),
    lambda_: float = 1.0,
    as_matrix: bool = True,
) -> torch.Tensor:
    """base + lambda * mean(s) * U V^T for the sum of deltas U diag(s) V^T, fp32 of base's shape.

    Directions whose singular value is zero have no U and V: they stay out of the sum and of the mean, so that the
    sum of singular values is kept (the authors' code fills them with whatever the SVD returns). Vectors get lambda
    times the mean of the deltas, as there. The authors' lambda is about 1.5 for eight vision models.

    Args:
        weight: of each delta.
        as_matrix: False treats a matrix like a vector, as configs do by default with embeddings and heads.
    """
    if base.ndim != 2 or not base.numel() or not as_matrix:
        return mean_delta(base, tensors, weight, lambda_)
    deltas = Deltas(base, tensors, weight)
    gram = torch.zeros(deltas.short, deltas.short, dtype=torch.float64)
    for part in deltas.parts():
        total = deltas.summed(part)
        gram.addmm_(total.T, total)
    vectors = eigenvectors(gram)
    del gram
    squares = torch.zeros(deltas.short, dtype=torch.float64)  # eigenvalues have lost what is small; these have not
    for part in deltas.parts():
        squares += (deltas.summed(part) @ vectors).square().sum(dim=0)
    values = squares.sqrt()
    known = values > negligible(deltas.long, deltas.short) * values.max()
    out = torch.empty_like(base, dtype=torch.float32)
    vectors, values = vectors[:, known], values[known]
    scale = lambda_ * float(values.mean()) if len(values) else 0.0
    turn = (vectors * (scale / values)) @ vectors.T
    for part in deltas.parts():
        deltas.changed(part, deltas.summed(part) @ turn, out)
    return out


def iso_c_copies(shape: tuple[int, ...]) -> float:
    """The result, and float64 squares of the shorter side: Gram matrix, eigenvectors and what computes them."""
    return 1 + (10 * min(shape) / max(1, max(shape)) if len(shape) == 2 else 0)
