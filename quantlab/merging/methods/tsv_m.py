"""TSV-M: task singular vectors, reduced and decorrelated (Gargiulo et al. 2024, arXiv 2412.00081)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from quantlab.adapters.truncated_svd import negligible
from quantlab.merging.methods.method import PerModel, each
from quantlab.merging.methods.summed import Deltas, eigenvectors, mean_delta


@torch.inference_mode()
def tsv_m(
    base: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    *,
    weight: PerModel = each(1.0),
    lambda_: float = 1.0,
    as_matrix: bool = True,
) -> torch.Tensor:
    """base + lambda * U' diag(s) V'^T, fp32 of base's shape.

    Of each delta the largest min(out, in) // models singular triplets are kept (at least one); U, s and V hold those of
    all models side by side, and U' and V' are the nearest matrices with orthonormal columns (Procrustes): the polar
    factors. Where columns depend on each other (equal models, more columns than rows) a polar factor is the one that is
    zero on what they leave out; singular values that are zero are left out too. So models that are equal give their own
    delta, reduced. Vectors get lambda times the mean of the deltas, as in the authors' code.

    Args:
        weight: of each delta.
        as_matrix: False treats a matrix like a vector, as configs do by default with embeddings and heads.
    """
    if base.ndim != 2 or not base.numel() or not as_matrix:
        return mean_delta(base, tensors, weight, lambda_)
    deltas = Deltas(base, tensors, weight)
    kept = max(1, deltas.short // len(tensors))
    found = [_leading(deltas, index, kept) for index in range(len(tensors))]
    right = torch.cat([vectors for vectors, _ in found], dim=1)  # [short, all]
    values = torch.cat([values for _, values in found])
    out = torch.empty_like(base, dtype=torch.float32)
    turns = [vectors / values for vectors, values in found]
    overlap = torch.zeros(len(values), len(values), dtype=torch.float64)
    for part in deltas.parts():
        left = _left(deltas, part, turns)
        overlap.addmm_(left.T, left)
    middle = (_inverse_root(overlap) * (lambda_ * values)) @ _inverse_root(right.T @ right) @ right.T
    for part in deltas.parts():
        deltas.changed(part, _left(deltas, part, turns) @ middle, out)
    return out


def _leading(deltas: Deltas, index: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` leading singular vectors of the shorter side, [short, k], and their values [k] > 0 of one delta."""
    gram = torch.zeros(deltas.short, deltas.short, dtype=torch.float64)
    for part in deltas.parts():
        delta = deltas.one(index, part)
        gram.addmm_(delta.T, delta)
    vectors = eigenvectors(gram)[:, deltas.short - count :].flip(1)
    squares = torch.zeros(count, dtype=torch.float64)
    for part in deltas.parts():
        squares += (deltas.one(index, part) @ vectors).square().sum(dim=0)
    values = squares.sqrt()
    known = values > negligible(deltas.long, deltas.short) * values.max()
    return vectors[:, known], values[known]


def _left(deltas: Deltas, part: slice, turns: Sequence[torch.Tensor]) -> torch.Tensor:
    """A part of U: singular vectors of the longer side, [part, all]."""
    return torch.cat([deltas.one(index, part) @ turn for index, turn in enumerate(turns)], dim=1)


def _inverse_root(overlap: torch.Tensor) -> torch.Tensor:
    """(X^T X)^(-1/2) on its range, zero elsewhere: X times it is the polar factor of X."""
    squares, vectors = torch.linalg.eigh(overlap)
    if not len(squares):
        return overlap
    known = squares > len(squares) * torch.finfo(torch.float64).eps * 16 * squares.max()
    vectors = vectors[:, known]
    return (vectors / squares[known].sqrt()) @ vectors.T


def tsv_m_copies(shape: tuple[int, ...]) -> float:
    """The result, and float64 squares of the shorter side: vectors of all models, overlaps and their roots."""
    return 1 + (20 * min(shape) / max(1, max(shape)) if len(shape) == 2 else 0)
