"""Text -> windows of tokens to score, each token exactly once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quantlab.checkpoint import Tokenizer
from quantlab.errors import InputError
from quantlab.training.corpus import read_documents

MAX_LOGITS = 1 << 26  # numbers in one batch of logits: 256 MB in fp32
MAX_BATCH = 16


@dataclass(frozen=True)
class Window:
    """`ids` go through the model at once; the last `scored` of them are the targets."""

    ids: tuple[int, ...]
    scored: int


def text_windows(path: Path, tokenizer: Tokenizer, context: int, stride: int | None = None) -> list[Window]:
    """The windows of a UTF-8 text file; lines `<|endoftext|>` part documents, and no window crosses them.

    A window begins with the model's start token if it has one, otherwise with a token of the text that is not scored
    (so a document's very first token is not). Without `stride`, windows share nothing else; with it, each window moves
    on by `stride` tokens and scores only these, so every token but the first ones has at least `context - stride`
    tokens before it.

    Raises:
        InputError: an unreadable or empty text, a context below 2, or a stride beyond the context.
    """
    longest = context - 1  # one place goes to the start token
    if longest < 1:
        raise InputError(f"context {context}: at least 2 tokens are needed")
    if stride is not None and not 1 <= stride <= longest:
        raise InputError(f"stride {stride}: must be at least 1 and at most the context less one ({longest})")
    windows: list[Window] = []
    for document in read_documents(path):
        ids = tokenizer.encode(document, add_special_tokens=False)
        lead = [] if tokenizer.bos is None else [tokenizer.bos]
        windows += _document_windows([*lead, *ids], longest, stride, bool(lead))
    if not windows:
        raise InputError(f"{path}: too short, no token can be scored")
    return windows


def _document_windows(ids: list[int], longest: int, stride: int | None, starts: bool) -> Iterator[Window]:
    """Windows over `ids`, whose first token is never scored; if it `starts` the text, it begins every window."""
    scored_until = 1
    while scored_until < len(ids):
        step = longest if stride is None or scored_until == 1 else stride
        until = min(scored_until + step, len(ids))
        since = scored_until if stride is None else max(until - longest, 1)
        first = ids[0] if starts else ids[since - 1]
        yield Window((first, *ids[since:until]), until - scored_until)
        scored_until = until


def batches(windows: list[Window], vocabulary: int) -> Iterator[list[Window]]:
    """Windows of equal length together, as many as keep a batch of logits within 256 MB, longest first."""
    by_length: dict[int, list[Window]] = {}
    for window in windows:
        by_length.setdefault(len(window.ids), []).append(window)
    for length in sorted(by_length, reverse=True):
        size = max(1, min(MAX_BATCH, MAX_LOGITS // (length * vocabulary)))
        group = by_length[length]
        for start in range(0, len(group), size):
            yield group[start : start + size]


def scored_positions(logits: np.ndarray, window: Window) -> tuple[np.ndarray, np.ndarray]:
    """Of a window's logits [tokens, vocabulary], those that predict its targets, and the targets."""
    end = len(window.ids) - 1
    return logits[end - window.scored : end], np.asarray(window.ids[len(window.ids) - window.scored :])
