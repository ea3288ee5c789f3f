"""Calibration text -> windows of tokens, drawn by a seed: what a model reads while its layers' inputs are measured."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quantlab.calibration.fingerprint import fingerprint
from quantlab.checkpoint import Checkpoint, Tokenizer, load_tokenizer
from quantlab.checkpoint.chat_text import chat_template, render_chat
from quantlab.documents import read_documents, read_text
from quantlab.errors import InputError

DEFAULT_TEXT = Path(__file__).parent / "calibration.txt"
SAMPLES, LENGTH = 128, 512
LEAST_TOKENS = 512  # below that a layer's statistics are noise
PIECE = 1 << 17  # characters that are turned into tokens at a time
SPREAD = 2  # times the tokens wanted are made, so that windows come from many places
SHORTEST = 8  # tokens of a window that is worth a forward pass


@dataclass(frozen=True)
class CalibrationRequest:
    """What a user asks for; None means the default.

    `text` is a UTF-8 text file (lines `<|endoftext|>` part documents), or a `.jsonl` file of objects with "text" or
    "messages"; by default the text that quantlab brings along. `samples` windows of up to `length` tokens are drawn.
    """

    text: Path | None = None
    samples: int | None = None
    length: int | None = None
    seed: int = 0

    @property
    def names_text(self) -> bool:
        """Whether it asks for more than a seed."""
        return any(value is not None for value in (self.text, self.samples, self.length))

    def __post_init__(self) -> None:
        if self.text is not None:
            object.__setattr__(self, "text", Path(self.text))  # a str does as well
        if self.samples is not None and self.samples < 1:
            raise InputError(f"--calibration-samples {self.samples}: at least 1 is needed")
        if self.length is not None and self.length < 2 * SHORTEST:
            raise InputError(f"--calibration-length {self.length}: at least {2 * SHORTEST} tokens are needed")


def request_of(text: Path | None, samples: int | None, length: int | None, seed: int) -> CalibrationRequest | None:
    """What the command line asks for; None where it asks for nothing."""
    if text is None and samples is None and length is None and seed == 0:
        return None
    return CalibrationRequest(text, samples, length, seed)


@dataclass(frozen=True)
class CalibrationSamples:
    """Windows of token ids, each within one document, after the start token if the model has one.

    `notes` tell where the text gave less than was asked for.
    """

    windows: tuple[tuple[int, ...], ...]
    length: int
    seed: int
    bundled: bool
    notes: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens in all windows."""
        return sum(map(len, self.windows))

    def digest(self) -> str:
        """A hash of the windows, in their order."""
        hasher = hashlib.sha256()
        for window in self.windows:
            hasher.update(np.asarray([len(window), *window], dtype="<i8").tobytes())
        return hasher.hexdigest()[:16]

    def provenance(self) -> dict[str, Any]:
        """What the output's configuration says of them."""
        counts = {"samples": len(self.windows), "length": self.length, "tokens": self.tokens, "seed": self.seed}
        return {"hash": self.digest(), "text": "bundled" if self.bundled else "given", **counts}

    def record(self) -> dict[str, Any]:
        """`provenance`, and the fingerprint that tells an evaluation whether it repeats this text."""
        return {**self.provenance(), "fingerprint": list(fingerprint(self.windows))}


def open_calibration(checkpoint: Checkpoint, request: CalibrationRequest) -> CalibrationSamples:
    """Draw the windows that `request` asks for, by the checkpoint's own tokenizer.

    Documents are cut into windows of `length` tokens; windows are drawn without replacement until they hold `samples` x
    `length` tokens, so that short documents make more windows, not less text. Of a large text only some pieces, drawn
    too, are turned into tokens.

    Raises:
        InputError: the text cannot be read, is empty, no text, or too short; the model has no tokenizer, or no chat
            template where the text is chats; the length is beyond the model's context.
    """
    path = request.text if request.text is not None else DEFAULT_TEXT
    length = _length(checkpoint, request)
    tokenizer = load_tokenizer(checkpoint.path)
    wanted = (request.samples or SAMPLES) * length
    random = np.random.default_rng(request.seed)
    windows: list[tuple[int, ...]] = []
    available = 0
    for piece in _pieces(_texts(path, tokenizer, checkpoint.path), random):
        found = _windows(tokenizer.encode(piece, add_special_tokens=False), length, tokenizer.bos)
        windows += found
        available += sum(map(len, found))
        if available >= SPREAD * wanted:
            break
    if available < LEAST_TOKENS:
        raise InputError(f"{path}: too short to calibrate with: {available} tokens, at least {LEAST_TOKENS} are needed")
    chosen = _drawn(windows, wanted, random)
    notes: tuple[str, ...] = ()
    if available < wanted and (request.text is not None or request.samples is not None):
        notes = (f"the calibration text gives {available} of the {wanted} tokens asked for; all of it is used",)
    return CalibrationSamples(chosen, length, request.seed, request.text is None, notes)


def _length(checkpoint: Checkpoint, request: CalibrationRequest) -> int:
    config = checkpoint.config
    limit = next((v for k in ("max_position_embeddings", "n_positions") if isinstance(v := config.get(k), int)), LENGTH)
    if request.length is None:
        return min(LENGTH, limit)
    if request.length > limit:
        raise InputError(f"--calibration-length {request.length}: the model holds {limit} tokens")
    return request.length


def _texts(path: Path, tokenizer: Tokenizer, model: Path) -> list[str]:
    if path.suffixes[-1:] == [".jsonl"] or path.suffixes[-2:] == [".jsonl", ".gz"]:
        return _json_texts(path, tokenizer, model)
    texts = read_documents(path)
    if any("\0" in text for text in texts):
        raise InputError(f"{path}: holds zero bytes: a binary file, no text")
    return texts


def _pieces(texts: list[str], random: np.random.Generator) -> Iterator[str]:
    """The texts in a random order, long ones in pieces that end with a line where there are lines."""
    pieces = []
    for text in texts:
        start = 0
        while start < len(text):
            end = start + PIECE
            if end < len(text):
                end = text.rfind("\n", start + PIECE // 2, end) + 1 or end
            pieces.append(text[start:end])
            start = end
    for index in random.permutation(len(pieces)):
        yield pieces[index]


def _json_texts(path: Path, tokenizer: Tokenizer, model: Path) -> list[str]:
    """The text of each line's object; chats by the model's template."""
    texts, template = [], None
    for number, line in enumerate(read_text(path).split("\n"), start=1):  # a text in JSON may hold other line breaks
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        row = _json_object(line, where)
        if isinstance(row.get("text"), str):
            texts.append(row["text"])
            continue
        if not _are_messages(row.get("messages")):
            raise InputError(f'{where}: holds neither "text" nor "messages" with role and content')
        template = template or chat_template(model)
        if template is None:
            raise InputError(f'{where}: holds "messages", and {model} has no chat template; give plain "text"')
        texts.append(render_chat(template, row["messages"], tokenizer, where))
    if not any(text.strip() for text in texts):
        raise InputError(f"{path}: holds no text")
    return texts


def _json_object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise InputError(f"{where}: is no JSON; each line must be one object") from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: is no JSON object")
    return row


def _are_messages(value: object) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in value)
    )


def _windows(ids: list[int], length: int, bos: int | None) -> list[tuple[int, ...]]:
    if ids and ids[0] == bos:  # a chat template wrote it already
        ids = ids[1:]
    lead = () if bos is None else (bos,)
    step = length - len(lead)
    windows = [(*lead, *ids[start : start + step]) for start in range(0, len(ids), step)]
    return [window for window in windows if len(window) >= SHORTEST]


def _drawn(windows: list[tuple[int, ...]], tokens: int, random: np.random.Generator) -> tuple[tuple[int, ...], ...]:
    """Windows in a random order until they hold `tokens`; all of them where they hold less."""
    chosen, count = [], 0
    for index in random.permutation(len(windows)):
        if count >= tokens:
            break
        chosen.append(windows[index])
        count += len(windows[index])
    return tuple(chosen)
