"""How much of what an adapter gained is left after fusing it into blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quantlab.adapters.combine import Source, weighted_adapters
from quantlab.checkpoint import load_tokenizer
from quantlab.checkpoint.chat_text import chat_template
from quantlab.divergence import negative_log_likelihood
from quantlab.errors import InputError
from quantlab.evaluation.scorers import Scorer, open_scorer
from quantlab.evaluation.windows import Window
from quantlab.training.prepared import DataSettings, prepare_data
from quantlab.training.sample import NO_LOSS, Sample

NORMAL_QUANTILE = 1.959964  # two-sided 95 %

Progress = Callable[[int, int, str], None]  # (samples scored, samples in all, which model)


@dataclass(frozen=True)
class Recovery:
    """`recovery` is (loss_base - loss_fused) / (loss_base - loss_adapter): 1 if fusing lost nothing. `low` and `high`
    are its 95 % interval over samples. Losses are nats per labelled token. What is not defined is NaN: the recovery of
    an adapter that gained nothing.
    """

    recovery: float
    low: float
    high: float
    loss_base: float
    loss_adapter: float
    loss_fused: float
    samples: int
    tokens: int


def measure_recovery(
    model: str | Path,
    adapters: Source | Sequence[Source],
    fused: str | Path,
    data: Path,
    *,
    settings: DataSettings,
    template: str | None = None,
    threads: int | None = None,
    activations: str = "f32",
    progress: Progress | None = None,
) -> Recovery:
    """Score held-out rows by the base, by the base with its adapters, and by the fused model.

    Args:
        data: rows that were not trained on; of a folder the valid or else the test file.
        settings: how rows become samples, as in training.
        template: a chat template instead of the model's own.

    Raises:
        InputError: models, adapters or data that cannot be read.
    """
    template = chat_template(model) if template is None else template
    prepared = prepare_data(data, load_tokenizer(model), template, settings)
    samples = prepared.valid or prepared.test or prepared.train
    chosen = list(weighted_adapters(adapters))
    found = []
    cases: tuple[tuple[str, str | Path, list[Source]], ...] = (
        ("base", model, []),
        ("with the adapter", model, list(chosen)),
        ("fused", fused, []),
    )
    for number, (name, path, applied) in enumerate(cases):
        longest = max(len(sample.input_ids) for sample in samples)
        scorer = open_scorer(
            path, "auto", None, threads, activations=activations, longest=longest, adapters=applied or None
        )
        losses = []
        for done, sample in enumerate(samples):
            if progress is not None:
                progress(number * len(samples) + done, len(cases) * len(samples), name)
            losses.append(sample_loss(scorer, sample))
        found.append(np.array(losses))
    tokens = np.array([len(sample.trained) for sample in samples])
    base, adapter, left = found
    return recovery_of(base, adapter, left, tokens)


def sample_loss(scorer: Scorer, sample: Sample) -> float:
    """The sum of -ln p over a sample's labelled tokens, nats.

    Raises:
        InputError: the sample has ids that the model does not know, or more than it holds.
    """
    if len(sample.input_ids) > scorer.engine.context:
        raise InputError(f"{sample.place}: {len(sample.input_ids)} tokens; the model holds {scorer.engine.context}")
    targets, labels = np.array(sample.input_ids[1:]), np.array(sample.labels[1:])
    total, start = 0.0, 0
    for logits in scorer.parts(Window(tuple(sample.input_ids), len(targets), 0, 1)):
        part = slice(start, start + len(logits))
        counted = labels[part] != NO_LOSS
        total += float(negative_log_likelihood(logits[counted], targets[part][counted]).sum())
        start += len(logits)
    return total


def recovery_of(base: np.ndarray, adapter: np.ndarray, fused: np.ndarray, tokens: np.ndarray) -> Recovery:
    """From summed losses and labelled tokens of each sample, fp64 [samples].

    The interval is that of a ratio of sums with samples as units (delta method; Cochran 1977, Sampling Techniques,
    section 2.11).
    """
    kept, gained = base - fused, base - adapter
    total, count = float(gained.sum()), len(tokens)
    ratio = float(kept.sum()) / total if total else math.nan
    error = math.nan
    if total and count > 1:
        residuals = kept - ratio * gained
        error = math.sqrt(count / (count - 1) * float(np.square(residuals).sum())) / abs(total)
    of_base, of_adapter, of_fused = (float(part.sum() / tokens.sum()) for part in (base, adapter, fused))
    reach = NORMAL_QUANTILE * error
    return Recovery(ratio, ratio - reach, ratio + reach, of_base, of_adapter, of_fused, count, int(tokens.sum()))
