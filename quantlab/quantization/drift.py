"""Weights that make up for what quantized predecessors changed in a layer's inputs, before they are quantized too.

A layer of the original model reads y, its quantized copy x, and what counts is that the copy's output is W y. The best
float weight for that is W' = W + W E[(y - x) x^T] E[x x^T]^-1, by least squares; quantizing W' under E[x x^T] in the
place of W is what GPTAQ (arXiv 2504.02692) calls asymmetric calibration. A layer whose outputs are added to hidden
states, s in the original and r in the copy, can make up for their drift as well: it should give W y + s - r, so that
E[(W y + s - (W x + r)) x^T] stands in the place of W E[(y - x) x^T].

Inputs tell little of the drift, and with few tokens a column what they seem to tell is mostly chance, which damping has
to keep out. Where they explain a share R^2 of it, the damping that leaves the least error, in shares of the mean
diagonal, is about columns / (tokens R^2), as that of any ridge regression with coefficients alike in size. Divergence
of fable-9m in Q4_1 (256 and 1024 columns, windows of 512 tokens, one draw of 8 and 16, two of 128; `-`: not measured):

    windows                          8          16         128
    without correction               0.003045   0.002457   0.0021
    damping of 1 %                   0.004276   0.002647   0.001631
    R^2 = 1/2                        0.003075   0.002257   0.001620
    R^2 = 1/5                        0.003089   0.002193   0.001611
    R^2 = 1/10                       0.002953   0.002160   0.001597
    R^2 = 1/20                       -          0.002225   -
"""

from __future__ import annotations

from functools import partial
from typing import cast

import numpy as np
import torch

from quantlab.quantization.statistics import InputStatistics
from quantlab.quantization.workers import in_order

ROWS = 256  # of the weight at a time
EXPLAINED = 0.1  # R^2
LEAST_DAMPING = 0.01  # of the mean diagonal, added to it
ATTEMPTS = 4  # with ten times the damping each


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

    damping = damping_of(len(moment), statistics.tokens)
    # solved with in fp32: its errors are far below the damping
    (factor,) = in_order(partial(_factor, damping=damping), [moment], 1)
    found = weight + torch.cat(list(in_order(change, range(0, len(weight), ROWS), threads)))
    if not bool(found.isfinite().all()):
        raise ArithmeticError("a weight beyond fp32")
    return found


def damping_of(columns: int, tokens: int) -> float:
    """What is added to the second moment of so many columns' inputs, in shares of its mean diagonal."""
    return max(LEAST_DAMPING, columns / (tokens * EXPLAINED))


def _factor(moment: torch.Tensor, damping: float) -> torch.Tensor:
    """The lower triangular factor of `moment`, float64 [in, in], with `damping` of its mean diagonal, or as much more
    as it takes; float32.
    """
    diagonal = moment.diagonal()
    added, mean = 0.0, float(diagonal.mean())
    for attempt in range(ATTEMPTS):
        wanted = damping * 10**attempt * mean
        diagonal.add_(wanted - added)
        factor, failed = torch.linalg.cholesky_ex(moment)
        if not failed:
            return cast("torch.Tensor", factor.float())
        added = wanted
    raise ArithmeticError("not positive definite")
