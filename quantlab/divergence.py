"""What logits say of text and of each other, token by token, and means with honest standard errors.

Elementwise work is fp32, sums are fp64; a model compared with itself has a divergence of exactly 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from quantlab.errors import InputError


def negative_log_likelihood(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """-ln p(target), fp64 [tokens], from logits fp32 [tokens, vocabulary] and target ids [tokens]."""
    shifted, log_total = _shifted(logits)
    return log_total - shifted[np.arange(len(targets)), targets]


def kl_divergence(logits_a: np.ndarray, logits_b: np.ndarray) -> np.ndarray:
    """KL(a || b) in nats, fp64 [tokens], from two arrays of logits, fp32 [tokens, vocabulary]."""
    shifted_a, log_total_a = _shifted(logits_a)
    shifted_b, log_total_b = _shifted(logits_b)
    weights = np.exp(shifted_a)
    difference = shifted_a - shifted_b
    weighted = np.einsum("ij,ij->i", weights, difference, dtype=np.float64, casting="same_kind")
    return weighted / np.exp(log_total_a) + (log_total_b - log_total_a)


def same_top(logits_a: np.ndarray, logits_b: np.ndarray) -> np.ndarray:
    """Whether both put the same token first, bool [tokens]."""
    return logits_a.argmax(axis=1) == logits_b.argmax(axis=1)


def _shifted(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits less their maximum (fp32), and the log of their sum of exponentials (fp64)."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted, np.log(np.exp(shifted).sum(axis=1, dtype=np.float64))


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
