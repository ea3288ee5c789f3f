"""Plain-text corpora for pretraining: files -> documents -> token streams -> training windows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quantlab.documents import DOCUMENT_END as DOCUMENT_END
from quantlab.documents import read_documents as read_documents
from quantlab.documents import read_text as read_text
from quantlab.errors import InputError

SPLIT_NAMES = {"train": ("train",), "validation": ("validation", "valid"), "test": ("test",)}
SUFFIXES = (".txt", ".txt.gz")


@dataclass(frozen=True)
class Corpus:
    """The files of one corpus; `validation` and `test` may be absent (None)."""

    train: Path
    validation: Path | None
    test: Path | None


def open_corpus(path: Path) -> Corpus:
    """Find the splits of a folder with `train.txt[.gz]`, `validation.txt[.gz]`, `test.txt[.gz]`, or take one text file.

    Raises:
        InputError: the path does not exist, or a folder holds no training text.
    """
    if path.is_file():
        return Corpus(path, None, None)
    if not path.is_dir():
        raise InputError(f"{path}: no such file or folder; give a text file or a folder with train.txt")
    found = {split: _first_file(path, names) for split, names in SPLIT_NAMES.items()}
    if found["train"] is None:
        raise InputError(f"{path}: holds no train.txt or train.txt.gz")
    return Corpus(found["train"], found["validation"], found["test"])


def _first_file(folder: Path, names: Iterable[str]) -> Path | None:
    candidates = (folder / (name + suffix) for name in names for suffix in SUFFIXES)
    return next((file for file in candidates if file.is_file()), None)


def token_stream(encoded: Iterable[list[int]], vocabulary_size: int, bos: int, eos: int) -> np.ndarray:
    """Join encoded documents into one stream, each between its start and end token, in the smallest fitting dtype."""
    dtype = np.min_scalar_type(vocabulary_size - 1)
    return np.concatenate([np.asarray([bos, *ids, eos], dtype=dtype) for ids in encoded])


class WindowSampler:
    """Training batches as a pure function of their index, so that a resumed run sees exactly the same data.

    Window `i` belongs to epoch `i // windows_per_epoch`. Each epoch shifts the grid by a random offset and visits its
    windows in a random order, both drawn from (seed, context, epoch). A window is the start token followed by
    `context - 1` stream tokens, which is how the model is read later, wherever a prompt begins.
    """

    def __init__(self, stream: np.ndarray, context: int, bos: int, seed: int) -> None:
        if len(stream) < 2 * context:
            raise InputError(f"the training text has {len(stream)} tokens; at least {2 * context} are needed")
        self.stream, self.context, self.bos, self.seed = stream, context, bos, seed
        self.windows_per_epoch = (len(stream) - (context - 1)) // (context - 1)
        self._epoch = -1
        self._starts = np.empty(0, dtype=np.int64)

    def batch(self, first: int, count: int) -> np.ndarray:
        """Windows `first` to `first + count - 1` as token ids, int64 [count, context]."""
        return np.stack([self._window(index) for index in range(first, first + count)])

    def _window(self, index: int) -> np.ndarray:
        epoch, position = divmod(index, self.windows_per_epoch)
        if epoch != self._epoch:
            self._starts, self._epoch = self._epoch_starts(epoch), epoch
        start = self._starts[position]
        return with_start(self.stream[start : start + self.context - 1], self.bos)

    def _epoch_starts(self, epoch: int) -> np.ndarray:
        generator = np.random.default_rng([self.seed, self.context, epoch])
        offset = generator.integers(self.context - 1)
        return offset + (self.context - 1) * generator.permutation(self.windows_per_epoch)


def with_start(tokens: np.ndarray, bos: int) -> np.ndarray:
    """The start token and `tokens`, int64."""
    return np.concatenate([[bos], tokens]).astype(np.int64)


def evaluation_batches(stream: np.ndarray, context: int, batch: int, bos: int) -> list[np.ndarray]:
    """Consecutive full windows over `stream` in batches, int64 [<= batch, context]; an incomplete one is left out."""
    starts = range(0, len(stream) - (context - 1) + 1, context - 1)
    windows = [with_start(stream[start : start + context - 1], bos) for start in starts]
    return [np.stack(windows[i : i + batch]) for i in range(0, len(windows), batch)]
