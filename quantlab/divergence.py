"""What logits say of text and of each other, token by token, and means with honest standard errors.

Elementwise work is fp32, sums are fp64; a model compared with itself has a divergence of exactly 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from quantlab.errors import InputError

BLOCK = 1 << 16  # logits at a time: a block and what is derived from it stay in a processor's second cache


@dataclass(frozen=True)
class TokenDivergence:
    """Of each token: -ln p(target) under a and b and KL(a || b) in nats, fp64 [tokens], and which token either puts
    first, int64 [tokens] (the smallest id among equals).
    """

    nll_a: np.ndarray
    nll_b: np.ndarray
    kld: np.ndarray
    top_a: np.ndarray
    top_b: np.ndarray


def compare_logits(logits_a: np.ndarray, logits_b: np.ndarray, targets: np.ndarray) -> TokenDivergence:
    """All that two models' logits, fp32 [tokens, vocabulary], say of each other and of target ids [tokens].

    Logits that are NaN or infinite give figures that are not finite.
    """
    tokens = len(targets)
    nll_a, nll_b, kld = np.empty(tokens), np.empty(tokens), np.empty(tokens)
    top_a, top_b = np.empty(tokens, np.int64), np.empty(tokens, np.int64)
    for rows in _blocks(logits_a):
        chosen = targets[rows]
        top_a[rows], top_b[rows] = logits_a[rows].argmax(axis=1), logits_b[rows].argmax(axis=1)
        shifted_a, weights_a, log_total_a = _softmax(logits_a[rows])
        shifted_b, _, log_total_b = _softmax(logits_b[rows])
        nll_a[rows] = log_total_a - shifted_a[np.arange(len(chosen)), chosen]
        nll_b[rows] = log_total_b - shifted_b[np.arange(len(chosen)), chosen]
        kld[rows] = _divergence(shifted_a, weights_a, log_total_a, shifted_b, log_total_b)
    return TokenDivergence(nll_a, nll_b, kld, top_a, top_b)


def negative_log_likelihood(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """-ln p(target), fp64 [tokens], from logits fp32 [tokens, vocabulary] and target ids [tokens]."""
    values = np.empty(len(targets))
    for rows in _blocks(logits):
        shifted, _, log_total = _softmax(logits[rows])
        values[rows] = log_total - shifted[np.arange(len(shifted)), targets[rows]]
    return values


def kl_divergence(logits_a: np.ndarray, logits_b: np.ndarray) -> np.ndarray:
    """KL(a || b) in nats, fp64 [tokens], from two arrays of logits, fp32 [tokens, vocabulary]."""
    return compare_logits(logits_a, logits_b, np.zeros(len(logits_a), np.int64)).kld


def same_top(logits_a: np.ndarray, logits_b: np.ndarray) -> np.ndarray:
    """Whether both put the same token first, bool [tokens]."""
    return logits_a.argmax(axis=1) == logits_b.argmax(axis=1)


def _blocks(logits: np.ndarray) -> Iterator[slice]:
    tokens, vocabulary = logits.shape
    step = max(1, BLOCK // vocabulary)
    for start in range(0, tokens, step):
        yield slice(start, min(start + step, tokens))


def _softmax(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits less their maximum and the exponentials of that (fp32), and the log of their sum (fp64)."""
    with np.errstate(invalid="ignore"):  # infinity less infinity: the caller finds NaN in the figures
        shifted = logits - logits.max(axis=1, keepdims=True)
    weights = np.exp(shifted)
    return shifted, weights, np.log(weights.sum(axis=1, dtype=np.float64))


def _divergence(
    shifted_a: np.ndarray,
    weights_a: np.ndarray,
    log_total_a: np.ndarray,
    shifted_b: np.ndarray,
    log_total_b: np.ndarray,
) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        difference = shifted_a - shifted_b
    weighted = np.einsum("ij,ij->i", weights_a, difference, dtype=np.float64, casting="same_kind")
    return weighted / np.exp(log_total_a) + (log_total_b - log_total_a)


def perplexity_of(nll: float) -> float:
    """The exponential of a mean negative log-likelihood; infinity where fp64 ends (above 709 nats)."""
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf


def mean_and_stderr(windows: Sequence[np.ndarray]) -> tuple[float, float]:
    """Mean over all tokens and its standard error, from per-token values grouped by window of text.

    Tokens of one window are not independent, so windows are the sampling units (ratio estimator with cluster-robust
    variance, Cochran 1977, Sampling Techniques, section 9A); with a single window, tokens are.

    Raises:
        InputError: there are no tokens.
    """
    filled = [window for window in windows if len(window)]
    if not filled:
        raise InputError("the text holds no token to score")
    count = sum(len(window) for window in filled)
    mean = sum(float(window.sum()) for window in filled) / count
    if len(filled) == 1:
        return mean, float(filled[0].std(ddof=1) / count**0.5) if count > 1 else float("nan")
    residuals = np.array([float(window.sum()) - mean * len(window) for window in filled])
    units = len(filled)
    return mean, float(np.sqrt(units / (units - 1) * np.square(residuals).sum()) / count)
