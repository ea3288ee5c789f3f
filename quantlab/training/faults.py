"""All that is wrong with a file's rows, in one line."""

from __future__ import annotations

from collections.abc import Sequence

from quantlab.errors import InputError

SHOWN = 10
LONGEST = 150  # characters of one fault, so that ten of them fit into an error's line


def listed(items: Sequence[str], separator: str = "; ") -> str:
    """The first ten of `items`, and how many others there are."""
    others = f"{separator}and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return separator.join(map(_short, items[:SHOWN])) + others


def bad_rows(path: object, faults: Sequence[str]) -> InputError:
    """The error for `faults`, each of which names its file and line."""
    rows = "1 bad row" if len(faults) == 1 else f"{len(faults)} bad rows"
    return InputError(f"{path}: {rows}: {listed(faults)}")


def counted(count: int, noun: str) -> str:
    """`1 row`, `2 rows`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 4] + " ..."
