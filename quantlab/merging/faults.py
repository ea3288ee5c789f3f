"""All that is wrong with a merge at once: a list of faults, each with what resolves it, raised as one error."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from quantlab.errors import InputError, one_line

MOST_CHARACTERS = 40_000  # of a message: all that does not fit is to be listed, and a hostile file may hold anything


class MergeError(InputError):
    """The error for one fault or many, in one line; `faults` holds them one by one."""

    def __init__(self, source: str, faults: tuple[str, ...]) -> None:
        listed = faults[0] if len(faults) == 1 else " ".join(f"({i}) {each}" for i, each in enumerate(faults, 1))
        count = "" if len(faults) == 1 else f"{len(faults)} faults: "
        super().__init__("")
        self.args = (one_line(f"{source}: {count}{listed}", MOST_CHARACTERS),)  # longer than other errors may be
        self.faults = faults


class Faults:
    """A list of faults in the making; `source` is the file that the error names."""

    def __init__(self, source: str) -> None:
        self.source = source
        self._found: dict[str, None] = {}

    def __bool__(self) -> bool:
        return bool(self._found)

    def add(self, problem: str, way_out: str = "") -> None:
        """Note what is wrong, and what resolves it."""
        self._found[f"{problem}; {way_out}" if way_out else problem] = None

    def check(self) -> None:
        """Raise what was found.

        Raises:
            MergeError: there was something.
        """
        if self._found:
            raise MergeError(self.source, tuple(self._found))


def nearest(word: str, known: Iterable[str]) -> str:
    """`did you mean ...?`, or else all that are known."""
    known = list(known)
    close = difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
