"""Text -> windows of tokens to score."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from quantlab.checkpoint import Tokenizer
from quantlab.documents import read_documents, read_text
from quantlab.errors import InputError

WINDOW_KINDS = ("documents", "llama")


@dataclass(frozen=True)
class Window:
    """`ids` go through the model at once; the last `scored` of them are the targets. The first target is token
    `position` of document `document`, both counted from 0, a start token not.
    """

    ids: tuple[int, ...]
    scored: int
    document: int
    position: int

    @property
    def targets(self) -> tuple[int, ...]:
        """The ids that are scored."""
        return self.ids[len(self.ids) - self.scored :]


def windows_of(
    path: Path, tokenizer: Tokenizer, context: int, stride: int | None = None, kind: str = "documents"
) -> list[Window]:
    """The windows of one kind: `text_windows` or `llama_windows`.

    Raises:
        InputError: see there; also an unknown kind, or a stride where there is none.
    """
    if kind not in WINDOW_KINDS:
        raise InputError(f"windows {kind!r}: choose one of: {', '.join(WINDOW_KINDS)}")
    if kind == "documents":
        return text_windows(path, tokenizer, context, stride)
    if stride is not None:
        raise InputError("llama windows have no stride; leave it out")
    return llama_windows(path, tokenizer, context)


def text_windows(path: Path, tokenizer: Tokenizer, context: int, stride: int | None = None) -> list[Window]:
    """The windows of a UTF-8 text file, each token scored exactly once; lines `<|endoftext|>` part documents, and no
    window crosses them.

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
    for number, document in enumerate(read_documents(path)):
        _check_text(document, path)
        ids = tokenizer.encode(document, add_special_tokens=False)
        lead = [] if tokenizer.bos is None else [tokenizer.bos]
        windows += _document_windows([*lead, *ids], longest, stride, bool(lead), number)
    if not windows:
        raise InputError(f"{path}: too short, no token can be scored")
    return windows


def _document_windows(
    ids: list[int], longest: int, stride: int | None, starts: bool, document: int
) -> Iterator[Window]:
    """Windows over `ids`, whose first token is never scored; if it `starts` the text, it begins every window."""
    scored_until = 1
    while scored_until < len(ids):
        step = longest if stride is None or scored_until == 1 else stride
        until = min(scored_until + step, len(ids))
        since = scored_until if stride is None else max(until - longest, 1)
        first = ids[0] if starts else ids[since - 1]
        yield Window((first, *ids[since:until]), until - scored_until, document, scored_until - int(starts))
        scored_until = until


def llama_windows(path: Path, tokenizer: Tokenizer, context: int) -> list[Window]:
    """What llama.cpp's `llama-perplexity -f FILE -c CONTEXT` scores, to compare figures with it.

    The whole file is one text, its last line break left out, words such as `<|endoftext|>` read as letters. Its tokens,
    the start token first, are cut into contexts that share nothing; the start token, if the model has one, replaces
    the first token of each; only the second half of a context is scored; what does not fill a context is left out.

    Raises:
        InputError: an unreadable text, one of less than two contexts (llama.cpp refuses it too), or a context below 4.
    """
    if context < 4:
        raise InputError(f"context {context}: at least 4 tokens are needed to score the second half")
    text = read_text(path).removesuffix("\n")
    _check_text(text, path)
    ids = _letters_only(tokenizer, text)
    if len(ids) < 2 * context:
        raise InputError(f"{path}: too short, {len(ids)} tokens; two contexts of {context} are needed")
    lead = 0 if tokenizer.bos is None else 1
    windows = []
    for start in range(0, len(ids) - context + 1, context):
        piece = ids[start : start + context]
        if tokenizer.bos is not None:
            piece[0] = tokenizer.bos
        scored = context - 1 - context // 2
        windows.append(Window(tuple(piece), scored, 0, start + context - scored - lead))
    return windows


def _check_text(text: str, path: Path) -> None:
    """A zero byte is UTF-8, but of no text."""
    if "\0" in text:
        raise InputError(f"{path}: not a text file (it holds zero bytes)")


def _letters_only(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text, the start token first, where the names of special tokens are letters like others."""
    backend = tokenizer.backend
    before = backend.encode_special_tokens
    backend.encode_special_tokens = True
    try:
        return tokenizer.encode(text)
    finally:
        backend.encode_special_tokens = before
