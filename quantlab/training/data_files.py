"""Which files hold the rows to train on, to evaluate on while training, and to test on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from quantlab.errors import InputError

SPLITS = {"train": ("train",), "valid": ("valid", "validation"), "test": ("test",)}
ROWS, TEXT = (".jsonl", ".jsonl.gz"), (".txt", ".txt.gz")
SUFFIXES = (*ROWS, *TEXT)


@dataclass(frozen=True)
class DataFiles:
    """One file a split; `unused` are a folder's other files that could hold data."""

    train: Path
    valid: Path | None = None
    test: Path | None = None
    unused: tuple[str, ...] = ()


def find_data(path: Path) -> DataFiles:
    """The files of a folder with `train.jsonl`, and perhaps `valid.jsonl` (or `validation.jsonl`) and `test.jsonl`; or
    one file to train on. Files are `.jsonl` or `.txt`, or `.gz` of either.

    Raises:
        InputError: there is no such file, none to train on, two for one split, or of another kind.
    """
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise InputError(f"{path}: is neither .jsonl (an object a line) nor .txt, nor .gz of either")
        return DataFiles(path)
    if not path.is_dir():
        raise InputError(f"{path}: no such file or folder; give a .jsonl or .txt file, or a folder with train.jsonl")
    found = {split: _only(path, names) for split, names in SPLITS.items()}
    train = found["train"]
    if train is None:
        raise InputError(f"{path}: holds no train.jsonl, nor train.txt, nor .gz of either")
    used = {file.name for file in found.values() if file is not None}
    unused = tuple(sorted(f.name for f in path.iterdir() if f.name.endswith(SUFFIXES) and f.name not in used))
    return DataFiles(train, found["valid"], found["test"], unused)


def _only(folder: Path, names: tuple[str, ...]) -> Path | None:
    files = [file for name in names for suffix in SUFFIXES if (file := folder / (name + suffix)).is_file()]
    if len(files) > 1:
        raise InputError(f"{folder}: holds {files[0].name} and {files[1].name}; leave one of them")
    return files[0] if files else None
