"""All scales of a row solved for together, and codes by coordinate descent, in turns.

With Phi(q) the matrix that takes a row's scales theta to its decoded weights, theta solves
(Phi^T H Phi) theta = Phi^T H w: two unknowns a block, 128 for 2048 columns. A visit of a block then chooses its codes
and scales anew against what would make up for the errors of all other blocks (error feedback within the block), moves
codes one by one and solves for the block's own scales.

Measured as in gptq.py, from 0.319 after error feedback: refit alone 0.311; one round with a pass of visits 0.306; two
rounds 0.304. Moving single codes alone, without quantizing anew, six rounds of two passes end at 0.307.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from quantlab.formats import BlockFormat
from quantlab.native.quantizers import SecondMoment, descend, refit

TRIALS = 8  # ways of quantizing a block anew, at each visit: rounds of eight
PASSES = 2  # over a block's codes and scales after that


def refit_blocks(
    weight: npt.NDArray[np.float32],
    format: BlockFormat,
    moment: SecondMoment,
    blocks: npt.NDArray[np.uint8],
    *,
    rounds: int,
    sweeps: int,
    threads: int | None = None,
) -> None:
    """Improve `blocks` of `weight` in place: each round refits all scales, then makes `sweeps` passes over the codes.

    No step raises the weighted error of any row by more than the rounding of fp32 sums.
    """
    for _ in range(rounds):
        refit(format.name, weight, format.levels, moment, blocks, threads=threads)
        if sweeps:
            descend(
                format.name,
                weight,
                format.levels,
                moment,
                blocks,
                sweeps=sweeps,
                trials=TRIALS,
                passes=PASSES,
                threads=threads,
            )
