"""Text to learn a merge's coefficients from: windows to train on, others to choose a state by, others to report on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quantlab.calibration.samples import LENGTH, CalibrationRequest, open_calibration
from quantlab.checkpoint import Checkpoint
from quantlab.errors import InputError

MOST_SELECTION, MOST_REPORT = 16, 64  # windows
FEWEST_TRAINING, FEWEST_SELECTION, FEWEST_REPORT = 8, 4, 8
MANY = 48  # windows; where a text gives fewer, they are made shorter
SHORTEST = 64  # tokens that they are made down to

Ids = tuple[int, ...]


@dataclass(frozen=True)
class LearningText:
    """Windows of token ids, none of which is in two of the three."""

    training: tuple[Ids, ...]
    selection: tuple[Ids, ...]
    report: tuple[Ids, ...]

    @property
    def length(self) -> int:
        """Tokens of the longest window."""
        return max(map(len, (*self.training, *self.selection, *self.report)))

    def counts(self) -> dict[str, int]:
        """How many tokens each split has."""
        splits = {"training": self.training, "selection": self.selection, "report": self.report}
        return {name: sum(map(len, windows)) for name, windows in splits.items()}


def learning_text(checkpoint: Checkpoint, text: Path, seed: int, training_tokens: int) -> LearningText:
    """Cut a text into windows of 512 tokens, or a half, quarter ... of that where it is short, and split them.

    Args:
        checkpoint: whose tokenizer reads the text.
        text: UTF-8, or `.jsonl` of "text" or "messages", as calibration text is.
        seed: draws windows, and which split they go to.
        training_tokens: that training will ask for at most.

    Raises:
        InputError: it is too short, or cannot be read (`open_calibration`).
    """
    length = LENGTH
    while True:
        windows = _drawn(checkpoint, text, length, seed, training_tokens)
        if len(windows) >= MANY or length // 2 < SHORTEST:
            return split_windows(windows, str(text))
        length //= 2


def _drawn(checkpoint: Checkpoint, text: Path, length: int, seed: int, training_tokens: int) -> list[Ids]:
    limits = (checkpoint.config.get(key) for key in ("max_position_embeddings", "n_positions"))
    length = min(length, *(limit for limit in limits if isinstance(limit, int)))
    samples = -(-training_tokens // length) + MOST_SELECTION + MOST_REPORT
    return list(dict.fromkeys(open_calibration(checkpoint, CalibrationRequest(text, samples, length, seed)).windows))


def split_windows(windows: Sequence[Ids], source: str) -> LearningText:
    """Split windows that are in a random order: a quarter to report on, an eighth to choose by, no more than needed.

    Raises:
        InputError: they are too few.
    """
    report, selection = min(MOST_REPORT, len(windows) // 4), min(MOST_SELECTION, len(windows) // 8)
    found = LearningText(
        training=tuple(windows[report + selection :]),
        selection=tuple(windows[report : report + selection]),
        report=tuple(windows[:report]),
    )
    fewest = (FEWEST_TRAINING, FEWEST_SELECTION, FEWEST_REPORT)
    if any(len(s) < n for s, n in zip((found.training, found.selection, found.report), fewest, strict=True)):
        longest = max(map(len, windows), default=0)
        needed = max(4 * FEWEST_REPORT, 8 * FEWEST_SELECTION)
        raise InputError(
            f"--learn {source}: too short: {len(windows)} different windows of up to {longest} tokens, and {needed} "
            "are needed to learn, to choose and to report on; give more text"
        )
    return found
