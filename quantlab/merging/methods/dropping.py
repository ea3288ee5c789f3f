"""Methods that drop elements of a difference at random: DARE and DELLA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch

from quantlab.errors import InputError
from quantlab.merging.methods.deltas import merge_deltas
from quantlab.merging.methods.method import Between, PerModel, SharePerModel, each
from quantlab.merging.methods.noise import PartNoise
from quantlab.merging.methods.sparsifiers import keep_at_random, keep_by_rank
from quantlab.merging.methods.sums import check_weights


def dare_linear(
    base: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    *,
    weight: PerModel = each(1.0),
    density: SharePerModel = each(1.0),
    lambda_: float = 1.0,
    normalize: bool = False,
    rescale: bool = True,
    noise: PartNoise,
) -> torch.Tensor:
    """DARE (arXiv 2311.03099): drop elements of each difference at random, divide the others by the density, add.

    The paper's rescaling: what is kept is divided by `density`, the probability to be kept. (mergekit restores the
    difference's sum of magnitudes instead.)
    """
    return _dare(base, tensors, noise, weight, density, lambda_, normalize, rescale, elect=False)


def dare_ties(
    base: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    *,
    weight: PerModel = each(1.0),
    density: SharePerModel = each(1.0),
    lambda_: float = 1.0,
    normalize: bool = False,
    rescale: bool = True,
    noise: PartNoise,
) -> torch.Tensor:
    """`dare_linear` with the sign election of TIES in place of the sum."""
    return _dare(base, tensors, noise, weight, density, lambda_, normalize, rescale, elect=True)


Epsilon = Annotated[PerModel, Between(0, 0.5)]


def della_linear(
    base: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    *,
    weight: PerModel = each(1.0),
    density: SharePerModel = each(1.0),
    epsilon: Epsilon = each(0.15),
    lambda_: float = 1.0,
    normalize: bool = False,
    rescale: bool = True,
    noise: PartNoise,
) -> torch.Tensor:
    """DELLA (arXiv 2406.11617) without its election: drop elements at random, small ones rather than large ones, add.

    An element's probability to be kept goes by the rank of its magnitude in its row (a vector is one row), from
    density - epsilon to density + epsilon: mergekit's epsilon, half of the paper's. What is kept is divided by its own
    probability. A density of 1 or 0 keeps all or nothing, whatever epsilon is.
    """
    return _della(base, tensors, noise, weight, density, epsilon, lambda_, normalize, rescale, elect=False)


def della(
    base: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    *,
    weight: PerModel = each(1.0),
    density: SharePerModel = each(1.0),
    epsilon: Epsilon = each(0.15),
    lambda_: float = 1.0,
    normalize: bool = False,
    rescale: bool = True,
    noise: PartNoise,
) -> torch.Tensor:
    """`della_linear` with the sign election of TIES in place of the sum, as the paper has it.

    The paper takes the mean of those that agree: that is `normalize`.
    """
    return _della(base, tensors, noise, weight, density, epsilon, lambda_, normalize, rescale, elect=True)


def check_della(density: PerModel, epsilon: PerModel, weight: PerModel, normalize: bool) -> None:
    """Raise InputError where a probability to be kept would be under 0 or over 1, or weights cannot be normalized."""
    check_weights(weight, normalize)
    for share, spread in zip(density, epsilon, strict=True):
        if share not in (0, 1) and not 0 <= share - spread <= share + spread <= 1:
            raise InputError(
                f"parameter 'epsilon': density {share:g} +- epsilon {spread:g} leaves the range from 0 to 1; "
                f"choose an epsilon of at most {min(share, 1 - share):g}"
            )


def _dare(
    base: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    noise: PartNoise,
    weight: PerModel,
    density: PerModel,
    lambda_: float,
    normalize: bool,
    rescale: bool,
    *,
    elect: bool,
) -> torch.Tensor:
    def sparsify(model: int, delta: torch.Tensor, first: int) -> None:
        share = density[model]
        if share < 1:
            keep_at_random(delta, share, noise(model, first, first + len(delta)), rescale)

    return merge_deltas(base, tensors, sparsify, weight=weight, lambda_=lambda_, normalize=normalize, elect=elect)


def _della(
    base: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    noise: PartNoise,
    weight: PerModel,
    density: PerModel,
    epsilon: PerModel,
    lambda_: float,
    normalize: bool,
    rescale: bool,
    *,
    elect: bool,
) -> torch.Tensor:
    columns = base.shape[-1] if base.ndim else 1

    def sparsify(model: int, delta: torch.Tensor, first: int) -> None:
        share = density[model]
        if share < 1:
            uniform = noise(model, first, first + len(delta)).view(-1, columns)
            keep_by_rank(delta.view(-1, columns), share, epsilon[model], uniform, rescale)

    return merge_deltas(
        base, tensors, sparsify, weight=weight, lambda_=lambda_, normalize=normalize, elect=elect, columns=columns
    )
