"""What the tests of finetune, fuse and export of adapters share: a few rows, options, and runs of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("accelerate")

OPTIONS = ("--rank", 4, "--context", 64, "--batch-size", 2, "--learning-rate", 0.02, "--max-steps", 4)


def write_rows(folder: Path, train: int = 10, valid: int = 3) -> Path:
    """A folder with a train and a valid file of prompts and completions."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": f"Say {n}: ", "completion": f"it is {n} and {n + 1}."} for n in range(train + valid)]
    for split, part in (("train", rows[:train]), ("valid", rows[train:])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


def names(folder: Path) -> list[str]:
    """What lies in a folder."""
    return sorted(path.name for path in folder.iterdir())
