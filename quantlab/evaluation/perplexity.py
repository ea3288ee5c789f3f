"""Perplexity of a model on a text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quantlab.adapters.combine import Source as AdapterSource
from quantlab.checkpoint import load_tokenizer
from quantlab.divergence import mean_and_stderr, negative_log_likelihood, perplexity_of
from quantlab.errors import InputError
from quantlab.evaluation.overlap import warn_of_overlap
from quantlab.evaluation.scorers import default_cache, open_scorer
from quantlab.evaluation.windows import Window, windows_of

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
    windows: int
    context: int
    engine: str
    activations: str
    kv: str


def perplexity(
    model: str | Path,
    text: str | Path,
    *,
    context: int = 512,
    stride: int | None = None,
    windows: str = "documents",
    engine: str = "auto",
    activations: str = "f32",
    kv: str | None = None,
    threads: int | None = None,
    adapters: Sequence[AdapterSource] | None = None,
    progress: Progress | None = None,
) -> PerplexityResult:
    """Score a text, by default every token once and in float activations; `windows_of` tells what precedes each.

    Args:
        model: folder, GGUF file or hub id.
        text: UTF-8 text file; lines `<|endoftext|>` part documents.
        context: tokens of a window.
        stride: move windows on by this many tokens, so that more text precedes a token.
        windows: "documents", or "llama" as llama.cpp cuts texts.
        engine: "auto", "native" or "torch".
        activations: "f32", or "int8" as generation has it by default (native engine).
        kv: element type of the cache: "f32", "f16" or "q8_0"; "f32" with float activations, else "f16".
        threads: by default one a core.
        adapters: low-rank updates to compute beside the weights; see `load_engine`.
        progress: called with tokens done, tokens in all, and the figure so far.

    Raises:
        InputError: the model, an adapter or the text cannot be read, the context is longer than the model's, or its
            logits are not finite.
    """
    cut = windows_of(Path(text), load_tokenizer(model), context, stride, windows)
    warn_of_overlap(model, cut)
    scorer = open_scorer(model, engine, context, threads, activations=activations, kv=kv, adapters=adapters)
    values, done, summed, total = [], 0, 0.0, sum(window.scored for window in cut)
    for window in cut:
        nll, start = np.empty(window.scored), 0
        for logits in scorer.parts(window):
            rows = slice(start, start + len(logits))
            nll[rows] = negative_log_likelihood(logits, np.asarray(window.targets[rows]))
            start = rows.stop
        check_finite(nll, window, str(model))
        values.append(nll)
        done, summed = done + window.scored, summed + float(nll.sum())
        if progress is not None:
            progress(done, total, f"perplexity {perplexity_of(summed / done):.3f}")
    mean, stderr = mean_and_stderr(values)
    value = perplexity_of(mean)
    return PerplexityResult(
        perplexity=value,
        nll=mean,
        stderr=stderr,
        perplexity_stderr=value * stderr,
        tokens=total,
        windows=len(cut),
        context=context,
        engine=scorer.name,
        activations=activations,
        kv=kv or default_cache(activations),
    )


def check_finite(figures: np.ndarray, window: Window, model: str) -> None:
    """Refuse logits that are NaN or infinite, from what was computed of them, fp64 [targets].

    Raises:
        InputError: the first such place, by document and token, counted from 0.
    """
    bad = np.flatnonzero(~np.isfinite(figures))
    if bad.size:
        place = f"document {window.document}, token {window.position + int(bad[0])}"
        raise InputError(f"{model}: its logits for {place} are NaN or infinite (see: quantlab verify {model})")
