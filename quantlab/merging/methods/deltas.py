"""Base plus what is left of the models' differences from it: the frame of all methods that thin differences out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from quantlab.merging.methods.blocks import flat, longest, runs
from quantlab.merging.methods.election import Election
from quantlab.merging.methods.sums import normalized, short

Sparsify = Callable[[int, torch.Tensor, int], object]  # (model, run of its difference, to change in place, its index)


def merge_deltas(
    base: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    sparsify: Sparsify,
    *,
    weight: Sequence[float],
    lambda_: float,
    normalize: bool,
    elect: bool,
    columns: int = 1,
) -> torch.Tensor:
    """base + lambda * the combination of sparsified differences, fp32.

    Differences are taken in fp32. They are combined by sign election (`Election`), or else summed with their weights,
    in float64 with one rounding at the end.

    Args:
        sparsify: is given every run of every model's difference, models in order, from the part's start to its end.
        columns: runs hold a multiple of so many elements.
        normalize: divide by the sum of the weights, of those models that agree if there is an election.
    """
    out = torch.empty_like(base, memory_format=torch.contiguous_format)
    result, origin, parts = flat(out), flat(base), [flat(tensor) for tensor in tensors]
    bounds = list(runs(len(result), columns))
    most = longest(bounds)
    room = torch.empty((len(parts), most))
    combine = Election(weight, normalize, most) if elect else None
    shares = short([lambda_ * share for share in (normalized(weight) if normalize and not elect else weight)])
    wide = torch.empty((2, 0 if elect else most), dtype=torch.float64)
    for first, last in bounds:
        here = origin[first:last]
        deltas = []
        for model, part in enumerate(parts):
            delta = torch.sub(part[first:last], here, out=room[model, : last - first])
            sparsify(model, delta, first)
            deltas.append(delta)
        if combine is not None:
            torch.add(here, combine(deltas).mul_(lambda_), out=result[first:last])
        else:
            total, term = wide[:, : last - first]
            total.copy_(here)
            for delta, share in zip(deltas, shares, strict=True):
                total.add_(term.copy_(delta).mul_(share))
            result[first:last] = total
    return out
