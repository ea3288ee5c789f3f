"""Passages that a user gives as files, where no index finds them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from quantlab.documents import read_text
from quantlab.errors import InputError
from quantlab.generation.json_rows import read_rows
from quantlab.generation.sources import GivenSource


def read_passages(files: Sequence[Path]) -> list[GivenSource]:
    """A text file as one passage under its name, or of a file *.jsonl each row's "text", and "source" if it names one.

    Raises:
        InputError: a file cannot be read, or holds no text.
    """
    passages: list[GivenSource] = []
    for file in files:
        if file.suffix == ".jsonl":
            passages += read_rows(file, partial(_passage, file), "a set of passages", "no passage")
        elif text := read_text(file).strip():
            passages.append(GivenSource(file.name, text))
        else:
            raise InputError(f"{file}: holds no text")
    return passages


def _passage(file: Path, number: int, row: dict[str, Any]) -> GivenSource:
    source, text = row.get("source", f"{file.name}:{number}"), row.get("text")
    if not isinstance(source, str):
        raise ValueError('"source" is no text')
    if not isinstance(text, str) or not text.strip():
        raise ValueError('"text" is no text')
    return GivenSource(source, text.strip())
