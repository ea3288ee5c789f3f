"""Weights that make up for what quantized predecessors changed in a layer's inputs, before they are quantized too.

A layer of the original model reads y, its quantized copy x, and what counts is that the copy's output is W y. The best
float weight for that is W' = W + W E[(y - x) x^T] E[x x^T]^-1, by least squares; quantizing W' under E[x x^T] in the
place of W is what GPTAQ (arXiv 2504.02692) calls asymmetric calibration. A layer whose outputs are added to hidden
states, s in the original and r in the copy, can make up for their drift as well: it should give W y + s - r.
"""

from __future__ import annotations

import numpy as np
import torch

from quantlab.quantization.workers import in_order

ROWS = 256  # of the weight at a time
LEAST_DAMPING, MOST_DAMPING = 0.01, 10.0  # of the mean diagonal, added to it


def undrifted(
    weight: torch.Tensor,
    second_moment: torch.Tensor,
    drift: torch.Tensor,
    threads: int,
    residual_drift: torch.Tensor | None = None,
) -> torch.Tensor:
    """W' of float32 `weight` [out, in], float32; same arguments, same bits, for any number of threads.

    Args:
        second_moment: E[x x^T], float32 [in, in].
        drift: E[(y - x) x^T], float32 [in, in].
        residual_drift: E[(s - r) x^T], float32 [out, in].

    Raises:
        ArithmeticError: the second moment is not that of any inputs, or W' is beyond fp32.
    """
    exponent = int(np.frexp(float(second_moment.diagonal().mean(dtype=torch.float64)))[1])
    unit = torch.tensor(-exponent)  # a power of two, so that no product overflows or vanishes
    moment, apart = torch.ldexp(second_moment, unit).double(), torch.ldexp(drift, unit)

    def change(start: int) -> torch.Tensor:
        wanted = (weight[start : start + ROWS] @ apart).double()
        if residual_drift is not None:
            wanted += torch.ldexp(residual_drift[start : start + ROWS], unit).double()
        return torch.cholesky_solve(wanted.T, factor).T.float()

    (factor,) = in_order(_factor, [moment], 1)
    found = weight + torch.cat(list(in_order(change, range(0, len(weight), ROWS), threads)))
    if not bool(found.isfinite().all()):
        raise ArithmeticError("a weight beyond fp32")
    return found


def _factor(moment: torch.Tensor) -> torch.Tensor:
    """The lower triangular factor of `moment`, float64 [in, in], with as much damping as it takes."""
    diagonal = moment.diagonal()
    added, share, mean = 0.0, LEAST_DAMPING, float(diagonal.mean())
    while share <= MOST_DAMPING:
        diagonal.add_(share * mean - added)
        factor, failed = torch.linalg.cholesky_ex(moment)
        if not failed:
            return factor
        added, share = share * mean, 10 * share
    raise ArithmeticError("not positive definite")
