"""Perplexity of a model on a text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quantlab.checkpoint import load_tokenizer
from quantlab.divergence import mean_and_stderr, negative_log_likelihood, perplexity_of
from quantlab.errors import InputError
from quantlab.evaluation.scorers import open_scorer
from quantlab.evaluation.windows import batches, scored_positions, text_windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[int, int, str], None]  # (tokens done, tokens in all, the figure so far)


@dataclass(frozen=True)
class PerplexityResult:
    """`nll` is the mean negative log-likelihood in nats per token, `stderr` its standard error (windows are the
    sampling units), `perplexity` its exponential with `perplexity_stderr` to first order.
    """

    perplexity: float
    nll: float
    stderr: float
    perplexity_stderr: float
    tokens: int
    engine: str


def perplexity(
    model: str | Path,
    text: Path,
    *,
    context: int = 512,
    stride: int | None = None,
    engine: str = "auto",
    threads: int | None = None,
    progress: Progress | None = None,
) -> PerplexityResult:
    """Score every token of `text` once, in float activations; see `windows.text_windows` for what precedes each.

    `engine` is "auto", "native" or "torch"; `threads` by default one a core.

    Raises:
        InputError: the model or the text cannot be read, or the context is longer than the model's.
    """
    tokenizer = load_tokenizer(model)
    windows = text_windows(text, tokenizer, context, stride)
    scorer = open_scorer(model, engine, context, threads)
    values, done, total = [], 0, sum(window.scored for window in windows)
    for batch in batches(windows, scorer.vocabulary):
        for logits, window in zip(scorer.logits(batch), batch, strict=True):
            values.append(negative_log_likelihood(*scored_positions(logits, window)))
            done += window.scored
        if progress is not None:
            progress(done, total, f"perplexity {perplexity_of(sum(float(v.sum()) for v in values) / done):.3f}")
    nll, stderr = mean_and_stderr(values)
    value = perplexity_of(nll)
    return PerplexityResult(value, nll, stderr, value * stderr, total, scorer.name)


def check_limits(model: PreTrainedModel, context: int) -> int:
    """The vocabulary's size, once the context is known to fit.

    Raises:
        InputError: the context is longer than the model's.
    """
    config = model.config.get_text_config()
    if context > config.max_position_embeddings:
        raise InputError(f"context {context}: the model holds {config.max_position_embeddings} tokens; use --context")
    return int(config.vocab_size)
