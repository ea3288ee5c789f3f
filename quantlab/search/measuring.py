"""KL divergence of candidates from one float model on the same windows, again and again."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np

from quantlab.checkpoint import Checkpoint, open_checkpoint
from quantlab.divergence import kl_divergence, mean_and_stderr
from quantlab.errors import InputError
from quantlab.evaluation.scorers import NativeScorer
from quantlab.evaluation.windows import Window
from quantlab.generation.native_engine import NativeEngine

KEPT_LOGITS = 1 << 29  # bytes of the reference's logits to keep; where they take more, it runs beside each candidate

Count = Callable[[int], None]  # tokens done of one measurement


@dataclass(frozen=True)
class Divergence:
    """Mean KL(float model || candidate) in nats per token and its standard error, windows as sampling units."""

    kld: float
    stderr: float
    windows: int

    def upper_bound(self, confidence: float = 0.95) -> float:
        """The one-sided bound of the mean at that confidence, by Student's t."""
        return self.kld + student_quantile(confidence, self.windows - 1) * self.stderr


class Meter:
    """Measures checkpoints against `reference` in float activations with a float cache, on the native engine.

    Args:
        reference: the float model.
        windows: token ids of each, the first of which is not scored.
        threads: to compute with; the figures do not depend on it.
        context: tokens of the longest window that is to come, by default of the longest here.

    Attributes:
        tokens: that one measurement scores.

    Raises:
        InputError: the native engine does not compute this model.
    """

    def __init__(
        self,
        reference: Checkpoint,
        windows: Sequence[Sequence[int]],
        threads: int | None = None,
        context: int | None = None,
    ) -> None:
        self._context, self._threads = context or max(map(len, windows)), threads
        self._reference = self._scorer(reference)
        self._take(windows)

    def beside(self, windows: Sequence[Sequence[int]]) -> Meter:
        """Another meter on other windows of the same context; the reference is in memory once."""
        other = copy.copy(self)
        other._take(windows)
        return other

    def _take(self, windows: Sequence[Sequence[int]]) -> None:
        self._windows = [Window(tuple(ids), len(ids) - 1, 0, 0) for ids in windows]
        self.tokens = sum(window.scored for window in self._windows)
        fits = 4 * self.tokens * self._reference.vocabulary <= KEPT_LOGITS
        self._kept: list[np.ndarray] | None = [] if fits else None

    def _scorer(self, checkpoint: Checkpoint) -> NativeScorer:
        engine = NativeEngine(checkpoint, threads=self._threads, context=self._context, kv="f32", activations="f32")
        if engine.context < self._context:
            raise InputError(f"windows of {self._context} tokens: the model holds {engine.context}")
        return NativeScorer(engine)

    def measure(self, candidate: Checkpoint | Path, count: Count | None = None) -> Divergence:
        """The divergence of a checkpoint, or of the one at a path.

        Raises:
            InputError: its logits are NaN or infinite.
        """
        checkpoint = candidate if isinstance(candidate, Checkpoint) else open_checkpoint(candidate)
        scorer = self._scorer(checkpoint)
        values, done = [], 0
        for index, window in enumerate(self._windows):
            reference = self._logits(self._reference, window) if self._kept is None else self._kept_logits(index)
            values.append(kl_divergence(reference, self._logits(scorer, window)))
            if not np.isfinite(values[-1]).all():
                raise InputError(f"{checkpoint.path}: quantized, its logits are NaN or infinite")
            done += window.scored
            if count is not None:
                count(done)
        kld, stderr = mean_and_stderr(values)
        return Divergence(max(0.0, kld), stderr if math.isfinite(stderr) else 0.0, len(values))

    def _kept_logits(self, index: int) -> np.ndarray:
        assert self._kept is not None
        while len(self._kept) <= index:
            self._kept.append(self._logits(self._reference, self._windows[len(self._kept)]))
        return self._kept[index]

    @staticmethod
    def _logits(scorer: NativeScorer, window: Window) -> np.ndarray:
        return np.concatenate(list(scorer.parts(window)))


def student_quantile(probability: float, freedom: int) -> float:
    """Student's t: Cornish-Fisher's expansion (Abramowitz and Stegun 26.7.5), within 1 % from 3 degrees of freedom on;
    infinite where there are none.
    """
    if freedom < 1:
        return math.inf
    z = NormalDist().inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + math.fsum(term / freedom ** (power + 1) for power, term in enumerate(terms))
