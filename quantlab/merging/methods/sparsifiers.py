"""What keeps some elements of a difference between models and sets the others to 0: pure arithmetic, in place.

Each takes a run of a difference, fp32 and contiguous, changes it and returns it.
"""

from __future__ import annotations

import numpy as np
import torch

TINY = 1e-30  # less than any probability that a number of 24 bits can fall under, but for 0


def keep_largest(delta: torch.Tensor, magnitude: float, ties: int) -> torch.Tensor:
    """Keep what exceeds `magnitude`, and what equals it among the first `ties` elements."""
    ties = min(max(ties, 0), len(delta))
    if ties > 0 and magnitude >= 0:
        _shrink(delta[:ties], float(np.nextafter(np.float32(magnitude), np.float32(-1))))
    if ties < len(delta) and magnitude >= 0:
        _shrink(delta[ties:], magnitude)
    return delta


def _shrink(values: torch.Tensor, most: float) -> None:
    """Set to 0 what is in [-most, most]; nothing where `most` is negative."""
    if most >= 0:
        torch.ops.aten.hardshrink.out(values, most, out=values)


def keep_between(
    delta: torch.Tensor, lower: tuple[float, int], upper: tuple[float, int], room: torch.Tensor
) -> torch.Tensor:
    """Keep what `keep_largest` keeps with `lower` but not with `upper`: (magnitude, ties) each.

    Args:
        room: scratch of the run's size, fp32.
    """
    if upper[0] == float("inf"):
        return keep_largest(delta, *lower)
    largest = keep_largest(room.copy_(delta), *upper)
    return keep_largest(delta, *lower).sub_(largest)


def keep_at_random(delta: torch.Tensor, density: float, uniform: torch.Tensor, rescale: bool) -> torch.Tensor:
    """DARE's (arXiv 2311.03099): keep elements whose number is under `density`; divide by it if `rescale`.

    Args:
        uniform: numbers in [0, 1); overwritten.
    """
    delta.mul_(torch.lt(uniform, density, out=uniform))
    return delta.div_(density) if rescale and density > 0 else delta


def keep_by_rank(
    delta: torch.Tensor, density: float, epsilon: float, uniform: torch.Tensor, rescale: bool
) -> torch.Tensor:
    """DELLA's MAGPRUNE (arXiv 2406.11617) on rows: keep elements with a probability that grows with their magnitude.

    In a row the probabilities are evenly spaced from density - epsilon, for the smallest magnitude, to
    density + epsilon; of equal magnitudes the first in the row counts as smaller. A row of one element has `density`.
    A density of 0 or 1 is everybody's. What is kept is divided by its probability if `rescale`.

    Args:
        delta: [rows, columns].
        uniform: numbers in [0, 1), of the same shape.
    """
    if density in (0, 1):
        return delta.mul_(density)
    columns = delta.shape[1]
    spaced = torch.linspace(density - epsilon, density + epsilon, columns)
    if columns == 1:
        spaced.fill_(density)
    order = delta.abs().argsort(dim=1, stable=True)
    probability = torch.empty_like(delta).scatter_(1, order, spaced.expand_as(delta))
    delta.mul_(uniform < probability)
    return delta.div_(probability.clamp_min_(TINY)) if rescale else delta
