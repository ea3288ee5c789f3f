"""The compiled quantizers: fp32 weights and what is known of a layer's inputs in, better blocks out.

Weights are float32 [rows, columns], columns a multiple of 32; blocks are uint8 [rows, row bytes], changed in place
except by `search`. Arrays are C-contiguous. Bytes do not depend on the number of threads or on the processor; see the
package for QUANTLAB_CPU_KERNEL. Other Python threads run meanwhile.

Every function raises ValueError for an unknown format, levels it cannot use, shapes that do not belong together,
weights that are not finite or efforts beyond 1000, and TypeError for arrays of another type, number of dimensions or
memory layout.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

import quantlab.native._core as _core
from quantlab.native import Blocks, cpu_kernel, default_threads

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class SearchEffort:
    """Grid points for each end of a block's range, and rounds of least squares from the best of them."""

    clips: int = 8
    rounds: int = 3


USUAL_EFFORT = SearchEffort()


class SecondMoment:
    """A second moment, float32 [columns, columns] and symmetric, plus `damping` on its diagonal, laid out for products.

    Takes as much memory again.
    """

    def __init__(self, moment: Floats, damping: float = 0.0, *, threads: int | None = None) -> None:
        cpu_kernel()  # an error for a kernel that does not exist
        self.core = _core.SecondMoment(moment, damping, _threads(threads))


class FeedbackFactor:
    """The triangular factor of a damped second moment, its columns in processing order.

    Args:
        moment: float32 [columns, columns], symmetric.
        damping: what to add to the diagonal.
        order: int32 [columns], a permutation: the column processed first, second and so on.

    Raises:
        ArithmeticError: the damped moment is not positive definite.
    """

    def __init__(
        self, moment: Floats, damping: float, order: npt.NDArray[np.int32], *, threads: int | None = None
    ) -> None:
        cpu_kernel()
        self.core = _core.feedback_factor(moment, damping, order, _threads(threads))
        if self.core is None:
            raise ArithmeticError(f"the second moment with {damping:g} on its diagonal is not positive definite")


def search(
    format: str,
    weights: Floats,
    levels: int,
    importance: Floats,
    *,
    by_magnitude: bool = False,
    effort: SearchEffort = USUAL_EFFORT,
    threads: int | None = None,
) -> Blocks:
    """Choose scales by weighted search, and to each weight the nearest code of the scales in half precision.

    Args:
        levels: how many codes to use, as `quantize` has them.
        importance: float32 [columns], what a column's squared errors count; all alike in a block where all are zero.
        by_magnitude: let an error count sqrt(mean square of the row + weight^2) times besides, as ggml does.

    A block is rounded to nearest if that has the lower error, weighted by `importance`.
    """
    cpu_kernel()
    blocks = _empty_blocks(format, weights)
    _core.search_scales(
        format, levels, weights, importance, by_magnitude, effort.clips, effort.rounds, _threads(threads), blocks
    )
    return blocks


def feed_back(
    format: str,
    weights: Floats,
    levels: int,
    factor: FeedbackFactor,
    *,
    importance: Floats | None = None,
    blocks: Blocks | None = None,
    effort: SearchEffort = USUAL_EFFORT,
    trials: int = 2,
    threads: int | None = None,
) -> Blocks:
    """Round column by column, each error handed on to the columns after it (GPTQ, arXiv 2210.17323).

    Args:
        factor: of the inputs' second moment; each run of 32 columns in its order must be one block, unless `blocks` is
            given.
        importance: float32 [columns], for the search of a block's scales as the block is reached; by default the
            factor's squared pivots.
        blocks: take the scales from these, and change only the codes.
        trials: rounds of moving a block's ends by the error that feedback leaves.
    """
    given = blocks is not None
    if blocks is None:
        blocks = _empty_blocks(format, weights)
    _core.feed_back_errors(
        format,
        levels,
        weights,
        _core_of("factor", factor, FeedbackFactor),
        importance,
        given,
        effort.clips,
        effort.rounds,
        trials,
        _threads(threads),
        blocks,
    )
    return blocks


def refit(
    format: str,
    weights: Floats,
    levels: int,
    moment: SecondMoment,
    blocks: Blocks,
    *,
    ridge: float = 1e-5,
    threads: int | None = None,
) -> None:
    """Solve for all scales of a row together, codes fixed; rows whose weighted error would not fall stay.

    `ridge` is added to the normal equations' diagonal, relative to it.
    """
    known = _core_of("moment", moment, SecondMoment)
    _core.refit_scales(format, levels, weights, known, ridge, _threads(threads), blocks)


def descend(
    format: str,
    weights: Floats,
    levels: int,
    moment: SecondMoment,
    blocks: Blocks,
    *,
    sweeps: int = 1,
    trials: int | None = 2,
    passes: int = 2,
    scales: bool = True,
    threads: int | None = None,
) -> None:
    """Go over all blocks `sweeps` times, moving each to a lower weighted error of its row, the other blocks given.

    Args:
        trials: rounds of quantizing the block anew, with error feedback among its columns and its ends moved; 0 for its
            own scales only, None to leave all that out.
        passes: after that, over its codes one by one.
        scales: let least squares move the block's scales after each pass.
    """
    anew = -1 if trials is None else trials
    known = _core_of("moment", moment, SecondMoment)
    _core.descend(format, levels, weights, known, sweeps, anew, passes, scales, _threads(threads), blocks)


def refine(
    format: str,
    weights: Floats,
    levels: int,
    tiles: Floats,
    blocks: Blocks,
    *,
    trials: int = 8,
    passes: int = 2,
    threads: int | None = None,
) -> None:
    """One visit of `descend` with nothing but each block's own `tiles`, float32 [columns / 32, 32, 32], of the second
    moment: errors of different blocks count as independent. No block has a higher error, weighted so, than before or
    than rounding to nearest gives it, but for the rounding of fp32 sums.
    """
    cpu_kernel()
    _core.refine_blocks(format, levels, weights, tiles, trials, passes, _threads(threads), blocks)


def weighted_squares(
    format: str, weights: Floats, moment: SecondMoment, blocks: Blocks | None = None, *, threads: int | None = None
) -> npt.NDArray[np.float64]:
    """x H x^T and x x^T of each row, float64 [rows, 2]: x its rounding errors or, without `blocks`, its weights; H has
    the damping it was made with.
    """
    sums = np.empty((_extents(weights)[0], 2))
    known = _core_of("moment", moment, SecondMoment)
    _core.measure_errors(format, weights, known, _threads(threads), blocks, sums)
    return sums


def _extents(weights: Floats) -> tuple[int, int]:
    """Rows and columns; none of what is no matrix, and the core says what is wrong with it."""
    is_matrix = isinstance(weights, np.ndarray) and weights.ndim == 2
    return weights.shape if is_matrix else (0, 0)


def _empty_blocks(format: str, weights: Floats) -> Blocks:
    rows, columns = _extents(weights)
    return np.empty((rows, _core.row_bytes(format, columns)), np.uint8)


def _core_of(name: str, given: FeedbackFactor | SecondMoment, expected: type) -> object:
    if not isinstance(given, expected):
        raise TypeError(f"{name}: expected a {expected.__name__}, got {type(given).__name__}")
    return given.core


def _threads(threads: int | None) -> int:
    return default_threads() if threads is None else threads
