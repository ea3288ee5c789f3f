"""One weight and its input statistics in, blocks out: the door to all quantizers that are functions of one tensor."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from quantlab import native
from quantlab.errors import InputError
from quantlab.formats import BlockFormat, PackedTensor, format_named
from quantlab.formats.blocks import check_own_scales
from quantlab.native.quantizers import SecondMoment, weighted_squares
from quantlab.quantization.drift import undrifted
from quantlab.quantization.gptq import damped_factor, feedback_blocks, in_fp32_range, processing_order
from quantlab.quantization.refit import refit_blocks
from quantlab.quantization.search import DAMPING, importance_of, search_blocks, search_by_column
from quantlab.quantization.statistics import InputStatistics
from quantlab.quantization.workers import in_order

Method = Literal["rtn", "search", "gptq"]
METHODS: tuple[Method, ...] = ("rtn", "search", "gptq")

REFIT_ROUNDS = 2
DESCENT_SWEEPS = 1
NO_MOMENT = "second moment not positive definite: search"


@dataclass(frozen=True)
class QuantizedWeight:
    """Blocks and how far they are from the weight W, with Q their decoded values.

    `relative_error` is |W - Q| / |W| (Frobenius norms), `weighted_error` tr((W - Q) H (W - Q)^T) / tr(W H W^T) with H
    the second moment of the inputs as far as the method uses it (`rtn` its diagonal, `search` its tiles if they are
    known) or, without statistics, the identity; both are 0 for zero denominators. Where drift was corrected,
    `weighted_error` is that of the corrected weight. `note` states a fallback, if one was taken.
    """

    packed: PackedTensor
    note: str | None
    relative_error: float
    weighted_error: float


def quantize_weight(
    weight: torch.Tensor,
    format: str,
    method: Method,
    statistics: InputStatistics | None,
    *,
    name: str = "tensor",
    levels: int | None = None,
    threads: int | None = None,
    refit_rounds: int = REFIT_ROUNDS,
    descent_sweeps: int = DESCENT_SWEEPS,
    correct_drift: bool = True,
) -> QuantizedWeight:
    """Quantize float32 `weight` [out, in]; same arguments, same bytes, for any number of threads.

    Args:
        format: a block format's name.
        method: `rtn` needs no statistics; `search` without any weighs columns alike; `gptq` needs the second moment.
        statistics: of the inputs of this layer.
        name: what errors call the tensor.
        levels: how many codes to use, by default all of the format's.
        threads: the most to use, by default one a core.
        refit_rounds: of `gptq`: how often to solve for all scales of a row together, and then to improve codes.
        descent_sweeps: of `gptq`: passes of coordinate descent over the codes after each refit.
        correct_drift: of `gptq`, where the statistics know the drift: aim at the original layer's outputs (`drift`).

    Raises:
        InputError: a format with one scale a tensor for a method but `rtn`, a shape that does not fit the format, NaN
            or infinity in the weight or in the statistics, statistics of another shape, a scale beyond fp16, levels out
            of range.
    """
    chosen = format_named(format).with_levels(levels)
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}; choose one of: {', '.join(METHODS)}")
    if method != "rtn":
        check_own_scales(chosen, f"{name}: method {method}", "use rtn")
    nearest = chosen.quantize(weight, name)  # finds everything that is wrong with a weight
    if statistics is not None:
        statistics.check(weight.shape[0], weight.shape[1], name)
    values = np.ascontiguousarray(weight.detach().to("cpu", torch.float32).numpy())
    task = _Task(values, chosen, statistics, threads)
    if method == "rtn":
        return task.measured(nearest.blocks.cpu().numpy(), None)
    note = task.reason_for_search() if method == "gptq" else None
    if method == "search" or note is not None:
        if method == "search" and statistics is not None and not bool(statistics.diagonal.any()):
            note = "no activations seen: all columns weigh alike"
        return task.searched(note)
    return task.with_feedback(refit_rounds, descent_sweeps, correct_drift)


@dataclass(frozen=True)
class _Task:
    """A checked weight, float32 [rows, columns], and what is known about its inputs."""

    values: npt.NDArray[np.float32]
    format: BlockFormat
    statistics: InputStatistics | None
    threads: int | None

    def reason_for_search(self) -> str | None:
        """Why error feedback cannot be had, if it cannot."""
        if self.statistics is None or self.statistics.second_moment is None:
            return "no second moment: search"
        if not bool(self.statistics.diagonal.any()):
            return "no activations seen: search"
        return None

    def with_feedback(self, rounds: int, sweeps: int, correct_drift: bool) -> QuantizedWeight:
        """Error feedback, then refits; or search, where that proves better."""
        assert self.statistics is not None
        assert self.statistics.second_moment is not None
        if correct_drift and self.statistics.knows_drift:
            try:
                aimed = self._undrifted()
            except ArithmeticError:
                return self.searched(NO_MOMENT)
            found = aimed.with_feedback(rounds, sweeps, correct_drift=False)
            return replace(found, relative_error=self._distance(found.packed))
        moment = in_fp32_range(self.statistics.second_moment.detach().cpu().numpy())
        importance = importance_of(self.statistics, self.values.shape[1])
        try:
            factor, share = damped_factor(moment, processing_order(importance), self.threads)
        except ArithmeticError:
            return self.searched(NO_MOMENT)
        blocks = feedback_blocks(self.values, self.format, factor, self.threads)
        del factor  # as large as the moment
        damping = share * float(moment.diagonal().mean(dtype=np.float64))
        damped = SecondMoment(moment, damping, threads=self.threads)
        refit_blocks(self.values, self.format, damped, blocks, rounds=rounds, sweeps=sweeps, threads=self.threads)
        weighted, plain = self._squares(damped, damping, blocks)
        by_column = search_by_column(self.values, self.format, self.statistics, self.threads)
        if weighted > self._squares(damped, damping, by_column)[0]:
            return self.searched("error feedback was worse: search")
        whole, whole_plain = self._squares(damped, damping, None)
        packed = PackedTensor(torch.from_numpy(blocks), self.format)
        relative = _ratio(plain, whole_plain) ** 0.5
        return QuantizedWeight(packed, self._feedback_note(share), relative, _ratio(weighted, whole))

    def _undrifted(self) -> _Task:
        """The same with a weight that makes up for its inputs' drift."""
        known = self.statistics
        assert known is not None
        aim = undrifted(torch.from_numpy(self.values), known, self.threads or native.default_threads())
        return replace(self, values=aim.numpy())

    def _distance(self, packed: PackedTensor) -> float:
        """|W - Q| / |W| of decoded blocks."""
        return self.measured(packed.blocks.numpy(), None).relative_error

    def searched(self, note: str | None) -> QuantizedWeight:
        """The result of search with all that is known."""
        blocks = search_blocks(self.values, self.format, self.statistics, self.threads)
        return self.measured(blocks, note, by_tiles=True)

    def measured(self, blocks: npt.NDArray[np.uint8], note: str | None, *, by_tiles: bool = False) -> QuantizedWeight:
        """The result of `blocks`, its errors weighted by column or, if they are known, by tiles."""
        known = self.statistics.known_tiles() if by_tiles and self.statistics is not None else None
        importance = torch.from_numpy(importance_of(self.statistics, self.values.shape[1])).double()
        weights = importance if known is None else known.detach().cpu().double()
        packed = PackedTensor(torch.from_numpy(blocks), self.format)
        step = max(1, (1 << 20) // self.values.shape[1])  # rows at a time: memory stays flat

        def squares(start: int) -> npt.NDArray[np.float64]:
            original = torch.from_numpy(self.values[start : start + step])
            errors = original - self.format.dequantize(packed.blocks[start : start + step])
            pair = (errors, original)
            weighted = [_weighted(rows, weights) for rows in pair]
            return np.array([*weighted, *(float(rows.square().sum(dtype=torch.float64)) for rows in pair)])

        starts = range(0, len(self.values), step)
        threads = max(1, min(self.threads or native.default_threads(), len(starts)))
        sums = sum(in_order(squares, starts, threads), np.zeros(4))  # of errors and weights, weighted and plain
        return QuantizedWeight(packed, note, _ratio(sums[2], sums[3]) ** 0.5, max(0.0, _ratio(sums[0], sums[1])))

    def _squares(
        self, damped: SecondMoment, damping: float, blocks: npt.NDArray[np.uint8] | None
    ) -> tuple[float, float]:
        """tr(X H X^T) with H as it was before damping, and |X|^2: of the errors of `blocks`, or of the weight."""
        sums = weighted_squares(self.format.name, self.values, damped, blocks, threads=self.threads).sum(axis=0)
        return max(0.0, float(sums[0] - damping * sums[1])), float(sums[1])

    def _feedback_note(self, share: float) -> str | None:
        assert self.statistics is not None
        notes = []
        if share > DAMPING:
            notes.append(f"second moment nearly singular: damped by {share:.0%}")
        if self.statistics.tokens < self.values.shape[1]:
            notes.append(f"{self.statistics.tokens} calibration tokens for {self.values.shape[1]} inputs")
        return "; ".join(notes) or None


def _weighted(rows: torch.Tensor, weights: torch.Tensor) -> float:
    """The sum of x H x^T over float32 rows x; `weights` are the diagonal [columns] or the tiles of H, float64."""
    if weights.ndim == 1:
        return float(rows.square().sum(dim=0, dtype=torch.float64) @ weights)
    columns = rows.reshape(len(rows), len(weights), -1).permute(1, 2, 0)  # [blocks, 32, rows]
    return float((columns @ columns.transpose(1, 2)).double().mul(weights).sum())


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole > 0 else 0.0
