"""What a file scored, window by window, and ratios between files with paired standard errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from quantlab.checkpoint.atomic import atomic_file
from quantlab.divergence import compare_logits, perplexity_of
from quantlab.evaluation.compare import Progress
from quantlab.evaluation.scorers import open_scorer
from quantlab.evaluation.windows import Window


@dataclass(frozen=True)
class Scores:
    """Sums over the tokens of each window of text, fp64 [windows]: how many tokens, KL divergence from the original in
    nats, negative log-likelihood of the original and of the file, tokens that both rank first.
    """

    tokens: np.ndarray
    kld: np.ndarray
    nll_original: np.ndarray
    nll: np.ndarray
    same_top: np.ndarray

    @property
    def mean_kld(self) -> tuple[float, float]:
        """Nats per token, and its standard error."""
        return ratio(self.kld, self.tokens)

    @property
    def perplexity(self) -> float:
        """Of the file."""
        return perplexity_of(float(self.nll.sum() / self.tokens.sum()))

    @property
    def same_top_share(self) -> float:
        """Of all tokens."""
        return float(self.same_top.sum() / self.tokens.sum())


def ratio(numerators: np.ndarray, denominators: np.ndarray) -> tuple[float, float]:
    """The ratio of two sums over the same windows, and its standard error: windows are the sampling units, and the
    error is that of the linearized ratio (delta method; Cochran 1977, Sampling Techniques, section 2.11), so what makes
    a window hard for both sides cancels.

    Args:
        numerators: one sum a window, fp64 [windows].
        denominators: likewise.
    """
    units, total = len(numerators), float(denominators.sum())
    value = float(numerators.sum()) / total
    if units < 2:
        return value, float("nan")
    residuals = numerators - value * denominators
    return value, float(np.sqrt(units / (units - 1) * np.square(residuals).sum())) / total


def score_files(
    original: Path, files: Sequence[Path], windows: Sequence[Window], context: int, threads: int, progress: Progress
) -> list[Scores]:
    """What `quantlab compare ORIGINAL FILE` sums up, for several files at once: the original is computed only once."""
    reference = open_scorer(original, "auto", context, threads)
    others = [open_scorer(file, "auto", context, threads) for file in files]
    sums = np.zeros((len(files), len(fields(Scores)), len(windows)))
    done, total = 0, sum(window.scored for window in windows)
    for number, window in enumerate(windows):
        targets = np.asarray(window.targets)
        parts = zip(reference.parts(window), *(other.parts(window) for other in others), strict=True)
        start = 0
        for logits, *all_others in parts:
            some = targets[start : start + len(logits)]
            for row, compared in zip(sums, all_others, strict=True):
                found = compare_logits(logits, compared, some)
                agreed = (found.top_a == found.top_b).sum()
                row[:, number] += (len(some), found.kld.sum(), found.nll_a.sum(), found.nll_b.sum(), agreed)
            start += len(some)
        done += window.scored
        progress(done, total, f"KL divergence {sums[-1, 1].sum() / done:.5f}")
    return [Scores(*row) for row in sums]


def averaged(some: Sequence[Scores]) -> Scores:
    """The mean over several files (seeds) of what each window scored."""
    return Scores(*(np.mean([getattr(one, field.name) for one in some], axis=0) for field in fields(Scores)))


def save(scores: Scores, path: Path) -> None:
    """Keep them in an .npz file."""
    with atomic_file(path, replace=True) as temporary, temporary.open("wb") as file:
        np.savez(file, **{field.name: getattr(scores, field.name) for field in fields(Scores)})


def load(path: Path) -> Scores:
    """What `save` kept."""
    with np.load(path) as arrays:
        return Scores(**{field.name: arrays[field.name] for field in fields(Scores)})
