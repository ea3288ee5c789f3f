"""Methods that keep elements of a difference by their magnitude in the whole tensor: TIES and model breadcrumbs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch

from quantlab.merging.methods.blocks import flat
from quantlab.merging.methods.deltas import merge_deltas
from quantlab.merging.methods.magnitudes import ALL, NONE, Cutoff, KnownBeforehand, MagnitudeSurvey
from quantlab.merging.methods.method import PerModel, SharePerModel, Survey, each
from quantlab.merging.methods.sparsifiers import keep_between, keep_largest

Cutoffs = Sequence[Sequence[Cutoff]]  # by model, what its survey was asked for
Trim = Literal["tensor", "model"]


def ties(
    base: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    *,
    weight: PerModel = each(1.0),
    density: SharePerModel = each(1.0),
    lambda_: float = 1.0,
    normalize: bool = True,
    trim: Trim = "tensor",
    survey: Cutoffs,
    offset: int = 0,
) -> torch.Tensor:
    """TIES (arXiv 2306.01708): trim each difference to its largest elements, elect signs, merge those that agree.

    `trim` says among which elements a model's share `density` of the largest is sought: those of each tensor, as
    mergekit does it, or those of all tensors, as the paper does (its density is 0.2, its lambda about 1). Of a tensor
    exactly int(density * size) are kept, but at least one unless the density is 0; of equal ones the first. The global
    trim keeps all that equal the threshold, as the paper's code does.

    As in mergekit's documentation weights count in the election, and `normalize` divides by the sum of the weights of
    the models that agree; with equal weights that is the paper's mean of those that agree.
    """
    edges = _edges(base, tensors, survey, offset)

    def sparsify(model: int, delta: torch.Tensor, first: int) -> None:
        ((magnitude, edge),) = edges[model]
        keep_largest(delta, magnitude, edge - first)

    return merge_deltas(base, tensors, sparsify, weight=weight, lambda_=lambda_, normalize=normalize, elect=True)


def ties_survey(density: PerModel, trim: Trim) -> Survey:
    """Find the thresholds of a tensor, or of all tensors."""
    if all(share in (0, 1) for share in density):
        return KnownBeforehand(tuple((ALL if share else NONE,) for share in density))
    return MagnitudeSurvey(lambda model, size: [kept(density[model], size)], keeps_ties=trim == "model")


def ties_scope(parameters: Mapping[str, Any]) -> Trim:
    """What the survey goes over."""
    return "model" if parameters.get("trim") == "model" else "tensor"


def breadcrumbs(
    base: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    *,
    weight: PerModel = each(1.0),
    density: SharePerModel = each(1.0),
    gamma: SharePerModel = each(0.01),
    lambda_: float = 1.0,
    normalize: bool = False,
    survey: Cutoffs,
    offset: int = 0,
) -> torch.Tensor:
    """Model breadcrumbs (arXiv 2312.06795): leave out the largest and the smallest elements of each difference, add.

    Of a tensor the int(gamma * size) largest magnitudes are left out (beta, the paper calls that share), and of the
    others the int(density * size) largest kept, at least one unless the density is 0: all of them where density and
    gamma exceed 1 together. A tensor of less than 1 / gamma elements loses none at the top.
    """
    return _crumbs(base, tensors, survey, offset, weight, lambda_, normalize, elect=False)


def breadcrumbs_ties(
    base: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    *,
    weight: PerModel = each(1.0),
    density: SharePerModel = each(1.0),
    gamma: SharePerModel = each(0.01),
    lambda_: float = 1.0,
    normalize: bool = False,
    survey: Cutoffs,
    offset: int = 0,
) -> torch.Tensor:
    """`breadcrumbs` with the sign election of TIES."""
    return _crumbs(base, tensors, survey, offset, weight, lambda_, normalize, elect=True)


def breadcrumbs_survey(density: PerModel, gamma: PerModel) -> Survey:
    """Find the thresholds of a tensor: of those left out at the top, and of these with those that are kept."""

    def ranks(model: int, size: int) -> list[int]:
        top = floor_share(gamma[model], size)
        return [top, min(size, top + kept(density[model], size))]

    return MagnitudeSurvey(ranks)


def _crumbs(
    base: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    survey: Cutoffs,
    offset: int,
    weight: PerModel,
    lambda_: float,
    normalize: bool,
    *,
    elect: bool,
) -> torch.Tensor:
    edges = _edges(base, tensors, survey, offset)
    room = torch.empty(0)

    def sparsify(model: int, delta: torch.Tensor, first: int) -> None:
        nonlocal room
        if len(room) < len(delta):
            room = torch.empty(len(delta))
        upper, lower = ((magnitude, edge - first) for magnitude, edge in edges[model])
        keep_between(delta, lower, upper, room[: len(delta)])

    return merge_deltas(base, tensors, sparsify, weight=weight, lambda_=lambda_, normalize=normalize, elect=elect)


def _edges(
    base: torch.Tensor, tensors: Sequence[torch.Tensor], survey: Cutoffs, offset: int
) -> list[list[tuple[float, int]]]:
    """By model: each cutoff's magnitude, and the element of the part up to which its equals are kept."""
    origin = flat(base)

    def difference(model: int) -> Callable[[int, int], torch.Tensor]:
        whole = flat(tensors[model])
        return lambda first, last: whole[first:last] - origin[first:last]

    return [
        [(cutoff.magnitude, cutoff.edge(difference(model), offset, len(origin))) for cutoff in cutoffs]
        for model, cutoffs in enumerate(survey)
    ]


def floor_share(share: float, size: int) -> int:
    """The whole part of share * size, taking a share such as 0.29 for the decimal number that was written."""
    return int(share * size + 1e-6)


def kept(density: float, size: int) -> int:
    """How many of `size` elements a density keeps: at least one unless it is 0."""
    return max(1 if density > 0 else 0, floor_share(density, size))
