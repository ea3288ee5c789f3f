"""Weights that make up for what quantized predecessors changed in a layer's inputs, before they are quantized too.

A layer of the original model reads y, its quantized copy x, and what counts is that the copy's output is W y. The best
float weight for that is W' = W + W E[(y - x) x^T] E[x x^T]^-1, by least squares; quantizing W' under E[x x^T] in the
place of W is what GPTAQ (arXiv 2504.02692) calls asymmetric calibration. A layer whose outputs are added to hidden
states, s in the original and r in the copy, can make up for their drift as well: it should give W y + s - r, so that
E[(W y + s - (W x + r)) x^T] stands in the place of W E[(y - x) x^T].
"""

from __future__ import annotations

from typing import cast

import numpy as np
import torch

from quantlab.quantization.statistics import InputStatistics
from quantlab.quantization.workers import in_order

ROWS = 256  # of the weight at a time
LEAST_DAMPING, MOST_DAMPING = 0.01, 10.0  # of the mean diagonal, added to it


def undrifted(weight: torch.Tensor, statistics: InputStatistics, threads: int) -> torch.Tensor:
    """W' of float32 `weight` [out, in], float32; same arguments, same bits, for any number of threads.

    Args:
        statistics: with the second moment E[x x^T] and one of the drifts.

    Raises:
        ArithmeticError: the second moment is not that of any inputs, or W' is beyond fp32.
    """
    known, drift, output_drift = statistics.second_moment, statistics.drift, statistics.output_drift
    assert known is not None
    exponent = int(np.frexp(float(known.diagonal().mean(dtype=torch.float64)))[1])
    unit = torch.tensor(-exponent)  # a power of two, so that no product overflows or vanishes
    moment = torch.ldexp(known, unit).double()
    inputs_apart = None if drift is None else torch.ldexp(drift, unit)

    def change(start: int) -> torch.Tensor:
        rows = slice(start, start + ROWS)
        if inputs_apart is not None:
            wanted = weight[rows] @ inputs_apart
        else:
            assert output_drift is not None
            wanted = torch.ldexp(output_drift[rows], unit)
        return torch.cholesky_solve(wanted.T, factor).T

    (factor,) = in_order(_factor, [moment], 1)  # solved with in fp32: its errors are far below the damping
    found = weight + torch.cat(list(in_order(change, range(0, len(weight), ROWS), threads)))
    if not bool(found.isfinite().all()):
        raise ArithmeticError("a weight beyond fp32")
    return found


def _factor(moment: torch.Tensor) -> torch.Tensor:
    """The lower triangular factor of `moment`, float64 [in, in], with as much damping as it takes; float32."""
    diagonal = moment.diagonal()
    added, share, mean = 0.0, LEAST_DAMPING, float(diagonal.mean())
    while share <= MOST_DAMPING:
        diagonal.add_(share * mean - added)
        factor, failed = torch.linalg.cholesky_ex(moment)
        if not failed:
            return cast("torch.Tensor", factor.float())
        added, share = share * mean, 10 * share
    raise ArithmeticError("not positive definite")
