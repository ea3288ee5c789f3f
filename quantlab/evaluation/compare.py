"""How far a model's predictions are from another's: both run in lockstep over a text, no logits are stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quantlab.checkpoint import load_tokenizer
from quantlab.divergence import kl_divergence, mean_and_stderr, negative_log_likelihood, perplexity_of, same_top
from quantlab.errors import InputError
from quantlab.evaluation.perplexity import check_limits
from quantlab.evaluation.windows import batches, scored_positions, text_windows

Progress = Callable[[int, int, str], None]  # (tokens done, tokens in all, the figure so far)


@dataclass(frozen=True)
class CompareResult:
    """A is the reference. Divergences are KL(A || B) in nats per token; `kld_stderr` takes windows as sampling units;
    `same_top` is the share of tokens where both rank the same token first.
    """

    perplexity_a: float
    perplexity_b: float
    kld_mean: float
    kld_stderr: float
    kld_median: float
    kld_p99: float
    kld_max: float
    same_top: float
    same_top_stderr: float
    tokens: int
    engine: str


def compare(
    a: str | Path,
    b: str | Path,
    text: Path,
    *,
    context: int = 512,
    stride: int | None = None,
    progress: Progress | None = None,
) -> CompareResult:
    """Score `text` with both models at once.

    Raises:
        InputError: a model or the text cannot be read, the tokenizers differ on the text, the vocabularies differ in
            size, or the context is longer than a model's.
    """
    from quantlab.evaluation.forward import window_logits
    from quantlab.loading import load_model

    windows = text_windows(text, load_tokenizer(a), context, stride)
    if windows != text_windows(text, load_tokenizer(b), context, stride):
        raise InputError(f"{a} and {b} turn this text into different tokens; only models of one tokenizer compare")
    model_a, model_b = load_model(a), load_model(b)
    vocabulary = check_limits(model_a, context)
    if vocabulary != check_limits(model_b, context):
        raise InputError(f"{a} and {b} have vocabularies of different sizes")
    nll_a, nll_b, divergence, agreement = [], [], [], []
    done, total = 0, sum(window.scored for window in windows)
    for batch in batches(windows, vocabulary):
        both = zip(window_logits(model_a, batch), window_logits(model_b, batch), batch, strict=True)
        for window_a, window_b, window in both:
            logits_a, targets = scored_positions(window_a, window)
            logits_b, _ = scored_positions(window_b, window)
            nll_a.append(negative_log_likelihood(logits_a, targets))
            nll_b.append(negative_log_likelihood(logits_b, targets))
            divergence.append(kl_divergence(logits_a, logits_b))
            agreement.append(same_top(logits_a, logits_b).astype(np.float64))
            done += window.scored
        if progress is not None:
            progress(done, total, f"KL divergence {sum(float(d.sum()) for d in divergence) / done:.5f}")
    kld_mean, kld_stderr = mean_and_stderr(divergence)
    top_mean, top_stderr = mean_and_stderr(agreement)
    tokens = np.concatenate(divergence)
    return CompareResult(
        perplexity_a=perplexity_of(mean_and_stderr(nll_a)[0]),
        perplexity_b=perplexity_of(mean_and_stderr(nll_b)[0]),
        kld_mean=kld_mean,
        kld_stderr=kld_stderr,
        kld_median=float(np.median(tokens)),
        kld_p99=float(np.percentile(tokens, 99)),
        kld_max=float(tokens.max()),
        same_top=top_mean,
        same_top_stderr=top_stderr,
        tokens=total,
        engine="torch",
    )
