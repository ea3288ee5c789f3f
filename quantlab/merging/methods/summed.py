"""Parts of tensors in float64 along their longer side, so that methods on whole matrices hold no whole copy of one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from quantlab.errors import InputError
from quantlab.merging.methods.method import PerModel

PART = 256  # rows or columns of the longer side that are in float64 at a time


class Deltas:
    """What matrices differ from `base` by, times the models' weights, float64 [part of the longer side, shorter side].

    float32 differences are exact in float64, but for values of very different size.
    """

    def __init__(self, base: torch.Tensor, tensors: Sequence[torch.Tensor], weight: PerModel) -> None:
        self._weight = weight
        turned = base.shape[0] < base.shape[1]
        self._base = base.T if turned else base
        self._tensors = [tensor.T if turned else tensor for tensor in tensors]
        self.long, self.short = self._base.shape

    def parts(self) -> Iterator[slice]:
        """Slices of the longer side, in order."""
        for start in range(0, self.long, PART):
            yield slice(start, min(start + PART, self.long))

    def one(self, index: int, part: slice) -> torch.Tensor:
        """Of one model."""
        delta = self._tensors[index][part].to(torch.float64) - self._base[part].to(torch.float64)
        return delta.mul_(self._weight[index])

    def summed(self, part: slice) -> torch.Tensor:
        """Of all models."""
        total = self.one(0, part)
        for index in range(1, len(self._tensors)):
            total += self.one(index, part)
        return total

    def changed(self, part: slice, change: torch.Tensor, out: torch.Tensor) -> None:
        """Write base plus `change` [part of the longer side, shorter side] to that part of `out`."""
        target = out.T if out.shape[0] < out.shape[1] else out
        target[part] = (self._base[part] + change).to(torch.float32)


def eigenvectors(gram: torch.Tensor) -> torch.Tensor:
    """Of a Gram matrix of deltas, columns by ascending eigenvalue.

    Raises:
        InputError: it is not finite.
    """
    if not bool(gram.isfinite().all()):
        raise InputError("a model's weights hold NaN or infinity; a checkpoint is damaged")
    return torch.linalg.eigh(gram).eigenvectors


def mean_delta(base: torch.Tensor, tensors: Sequence[torch.Tensor], weight: PerModel, scale: float) -> torch.Tensor:
    """base + scale times the mean of the weighted deltas, fp32: what methods for matrices do to vectors."""
    flat_base, flat = base.reshape(-1), [tensor.reshape(-1) for tensor in tensors]
    out = torch.empty_like(flat_base, dtype=torch.float32)
    for start in range(0, len(flat_base), PART * PART):
        part = slice(start, start + PART * PART)
        origin = flat_base[part].to(torch.float64)
        total = torch.zeros_like(origin)
        for index, tensor in enumerate(flat):
            total += (tensor[part].to(torch.float64) - origin).mul_(weight[index])
        out[part] = origin + total * (scale / len(flat))
    return out.reshape(base.shape)
