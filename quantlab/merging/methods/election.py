"""TIES' consensus of models' differences (arXiv 2306.01708): a sign for every element, and the mean of who agrees."""

from __future__ import annotations

from collections.abc import Sequence

import torch

NO_DIVISOR = 1e-8  # sums of weights under this divide nothing


class Election:
    """Combines runs of weighted differences; it owns the scratch that this takes.

    The elected sign of an element is that of the weighted differences' sum, plus where the sum is 0. It is summed in
    float64, so that differences that cancel do so in every order of the models. Elements of the other sign, and those
    that are 0 because they were not kept, do not take part; the others are added and, if `normalize`, divided by the
    sum of their models' weights.

    Args:
        weight: of every model.
        normalize: whether to take the mean of the models that agree, or their sum.
        longest: elements in the longest run.
    """

    def __init__(self, weight: Sequence[float], normalize: bool, longest: int) -> None:
        first = weight[0]
        is_one = first > 0 and all(value == first for value in weight)  # then it is a factor of everything
        self._weight = [1.0] * len(weight) if is_one else list(weight)
        self._factor = first if is_one and not normalize else 1.0
        self._normalize = normalize
        # Weights of those that agree are added in ascending order: then the order of the models does not show.
        self._ascending = sorted(range(len(weight)), key=lambda model: self._weight[model])
        self._total = torch.empty(longest, dtype=torch.float64)
        self._sign = torch.empty(longest)
        self._divisor = torch.empty(longest)

    def __call__(self, deltas: Sequence[torch.Tensor]) -> torch.Tensor:
        """The merged difference, fp32, good until the next call. `deltas`, not yet weighted, are overwritten."""
        count = len(deltas[0])
        total, sign, divisor = (room[:count] for room in (self._total, self._sign, self._divisor))
        for model, delta in enumerate(deltas):
            if self._weight[model] != 1:
                delta.mul_(self._weight[model])
            total.copy_(delta) if model == 0 else total.add_(delta)
        torch.ge(total, 0, out=sign).mul_(2).sub_(1)
        for model, delta in enumerate(deltas):
            delta.mul_(sign).clamp_min_(0)  # the size of what agrees
            total.copy_(delta) if model == 0 else total.add_(delta)
        sign.mul_(total.mul_(self._factor) if self._factor != 1 else total)
        return sign.div_(self._agreeing(deltas, divisor)) if self._normalize else sign

    def _agreeing(self, sizes: Sequence[torch.Tensor], divisor: torch.Tensor) -> torch.Tensor:
        """Sums of the weights of models that agree, 1 where there is none. `sizes` are overwritten."""
        for place, model in enumerate(self._ascending):
            agrees = sizes[model].sign_()
            if place == 0:
                torch.mul(agrees, self._weight[model], out=divisor)
            else:
                divisor.add_(agrees, alpha=self._weight[model])
        least = self._weight[self._ascending[0]]
        if least > NO_DIVISOR:
            return divisor.clamp_min_(least)  # a sum is 0, and what it divides too, or at least the least weight
        return divisor.masked_fill_(divisor.abs() < NO_DIVISOR, 1)
