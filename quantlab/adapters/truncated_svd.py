"""The leading singular directions of a matrix, in float64, the same ones for the same matrix on the same machine.

Small ranks of large matrices come from a block Krylov space (Musco and Musco 2015, arXiv 1504.05477), everything else
from the eigenvectors of the smaller of the two Gram matrices. Squaring costs half of float64's digits, which leaves
more than float32 weights have.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

SPARE = 8  # directions of a Krylov block beyond the rank
STEPS = 8  # multiplications by D D^T: values to 1e-5 even of random matrices, which have no gaps between them
WORTH = 0.35  # of the smaller side: a Krylov space that is larger takes as long as the whole decomposition


@dataclass(frozen=True)
class SingularTriplets:
    """float64 `u` [out, k], `s` [k] descending and positive, `vh` [k, in], with orthonormal columns and rows."""

    u: torch.Tensor
    s: torch.Tensor
    vh: torch.Tensor

    @property
    def rank(self) -> int:
        """How many there are."""
        return len(self.s)

    def product(self) -> torch.Tensor:
        """u diag(s) vh, float64 [out, in]."""
        return (self.u * self.s) @ self.vh


@torch.inference_mode()
def truncated_svd(matrix: torch.Tensor, rank: int) -> SingularTriplets:
    """The `rank` largest singular values of a matrix [out, in] of any float type and their directions; fewer where the
    others are zero to rounding (`negligible`). The largest entry of every column of `u` is positive.
    """
    values = matrix.to(torch.float64)
    rows, columns = values.shape
    rank = min(rank, rows, columns)
    if (rank + SPARE) * (STEPS + 1) < WORTH * min(rows, columns):
        basis = _krylov_basis(values, rank + SPARE)
        inner = _by_gram(basis.T @ values, rank)
        found = SingularTriplets(basis @ inner.u, inner.s, inner.vh)
    else:
        found = _by_gram(values, rank)
    keep = int((found.s > negligible(rows, columns) * _largest(found.s)).sum())
    u, s, vh = found.u[:, :keep], found.s[:keep], found.vh[:keep]
    if keep:
        signs = torch.sign(u[u.abs().argmax(dim=0), torch.arange(keep)])
        u, vh = u * signs, vh * signs[:, None]
    return SingularTriplets(u, s, vh)


def negligible(rows: int, columns: int) -> float:
    """What part of the largest singular value a Gram matrix in float64 cannot tell from zero."""
    return float((max(rows, columns) * np.finfo(np.float64).eps) ** 0.5)


def _largest(values: torch.Tensor) -> float:
    return float(values[0]) if len(values) else 0.0


def _krylov_basis(values: torch.Tensor, width: int) -> torch.Tensor:
    """An orthonormal basis [out, (STEPS + 1) width] of the space of D X, (D D^T) D X, ... for a fixed random X."""
    draws = np.random.Generator(np.random.Philox(key=0)).standard_normal((values.shape[1], width))
    basis = torch.linalg.qr(values @ torch.from_numpy(draws)).Q
    for _ in range(STEPS):
        block = values @ (values.T @ basis[:, -width:])
        # Of the whole: subtracting what is known leaves noise where a matrix has few directions, and no new ones.
        basis = torch.linalg.qr(torch.cat([basis, block / _scale(block)], dim=1)).Q
    return basis


def _scale(block: torch.Tensor) -> float:
    return float(block.abs().max()) or 1.0


def _by_gram(values: torch.Tensor, rank: int) -> SingularTriplets:
    """All but negligible directions are accurate; the others are not orthonormal."""
    if values.shape[0] > values.shape[1]:
        turned = _by_gram(values.T, rank)
        return SingularTriplets(turned.vh.T, turned.s, turned.u.T)
    vectors = torch.linalg.eigh(values @ values.T).eigenvectors  # ascending
    u = vectors[:, len(vectors) - rank :].flip(1)
    vh = u.T @ values
    s = torch.linalg.vector_norm(vh, dim=1)
    return SingularTriplets(u, s, vh / s.clamp(min=torch.finfo(torch.float64).tiny)[:, None])
