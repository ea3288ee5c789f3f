"""Did a model see this text while it was calibrated? A few hashes of token windows, kept with the model, tell.

Of all windows of 13 tokens the 2,000 smallest hashes are kept: a fair sample whatever the text's length, in 16 kB. The
share of them that another text holds too estimates how much of the calibration text it repeats. Thirteen tokens are
long enough that independent texts share almost none (GPT-3's paper, arXiv 2005.14165, appendix C, takes 13 words).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

WINDOW = 13  # tokens
KEPT = 2_000  # hashes
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio, odd


def fingerprint(texts: Iterable[Sequence[int]]) -> tuple[str, ...]:
    """The smallest hashes of the token windows of `texts` (token ids each), as 16 hex digits, ascending."""
    return tuple(f"{int(value):016x}" for value in window_hashes(texts)[:KEPT])


def overlap(hashes: Sequence[str], texts: Iterable[Sequence[int]]) -> float:
    """The share of a fingerprint's windows that `texts` (token ids each, of the same tokenizer) hold as well."""
    if not hashes:
        return 0.0
    kept = np.array([int(digits, 16) for digits in hashes], dtype=np.uint64)
    return float(np.isin(kept, window_hashes(texts)).mean())


def overlap_note(calibration: Mapping[str, Any] | None, texts: Iterable[Sequence[int]]) -> str | None:
    """One line for a report where a model's calibration text comes back in an evaluation's `texts`, else None.

    Args:
        calibration: what `Checkpoint.sidecar("calibration")` holds.
        texts: token ids each, by the model's tokenizer.
    """
    hashes = calibration.get("fingerprint") if calibration is not None else None
    if not isinstance(hashes, list) or not all(isinstance(digits, str) for digits in hashes):
        return None
    try:
        share = overlap(hashes, texts)
    except ValueError:  # no hexadecimal digits: somebody's edit, not worth a failure
        return None
    if share < NOTED_SHARE:
        return None
    return f"{share:.0%} of the calibration text's windows occur in this text: the result flatters the quantized model"


NOTED_SHARE = 0.01


def window_hashes(texts: Iterable[Sequence[int]]) -> np.ndarray:
    """The distinct hashes of all windows, uint64, ascending; a text shorter than a window has none."""
    hashes = [_hashes(np.asarray(text, dtype=np.uint64)) for text in texts if len(text) >= WINDOW]
    return np.unique(np.concatenate(hashes)) if hashes else np.empty(0, np.uint64)


def _hashes(ids: np.ndarray) -> np.ndarray:
    """A polynomial over the window modulo 2^64, then splitmix64's finalizer, so that "smallest" is a fair draw."""
    count = len(ids) - WINDOW + 1
    value = np.zeros(count, np.uint64)
    with np.errstate(over="ignore"):
        for place in range(WINDOW):
            value = value * _MULTIPLIER + ids[place : place + count] + np.uint64(1)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
