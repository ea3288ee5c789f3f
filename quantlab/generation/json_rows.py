"""Files of JSON lines, each row checked, and all that is wrong with them told at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from quantlab.errors import InputError

MOST_FAULTS = 10  # listed of one file

Row = TypeVar("Row")


def read_rows(
    path: Path, parse: Callable[[int, dict[str, Any]], Row], what: str, nothing: str, most: int | None = None
) -> list[Row]:
    """What `parse` makes of each row's number (from 1) and object, of the first `most` rows; empty lines are no rows.

    Args:
        parse: raises ValueError with what is wrong.
        what: the kind of file, for one that is no text: "a task".
        nothing: what a file without rows does not hold: "no question".

    Raises:
        InputError: the file cannot be read, holds no row, or rows that are wrong, by their lines.
    """
    try:
        lines = path.read_bytes().decode("utf-8").split("\n")  # a text in JSON may hold other line breaks
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}); {what} is a file of JSON lines") from None
    rows: list[Row] = []
    faults = []
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    for number, line in numbered[:most]:
        try:
            rows.append(parse(number, _object(line)))
        except ValueError as error:
            faults.append(f"line {number}: {error}")
    if faults:
        more = f"; and {len(faults) - MOST_FAULTS} more" if len(faults) > MOST_FAULTS else ""
        raise InputError(f"{path}: {len(faults)} bad rows: {'; '.join(faults[:MOST_FAULTS])}{more}")
    if not rows:
        raise InputError(f"{path}: holds {nothing}")
    return rows


def _object(line: str) -> dict[str, Any]:
    try:
        row: Any = json.loads(line)  # Any: unchecked JSON
    except (ValueError, RecursionError):
        raise ValueError("is no JSON") from None
    if not isinstance(row, dict):
        raise ValueError("is no JSON object")
    return row
