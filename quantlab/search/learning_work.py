"""Unfinished learning of a merge's coefficients: a folder beside the destination, until that is written."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from quantlab.checkpoint import unfinished

STATE, START = "state.json", "start"


def learning_folder_of(out: Path) -> Path:
    """Where the unfinished work for destination `out` is kept."""
    return out.with_name(f"{out.name}.learning")


@contextlib.contextmanager
def open_learning(
    out: Path, options: Mapping[str, Any], *, resume: bool, discard: bool, say: list[str]
) -> Iterator[Path]:
    """The folder, locked; it stays after a failure as long as there is a state in it, else it goes.

    Args:
        options: JSON values that decide what is learned; unfinished work of others is not gone on with.
        resume: go on with unfinished work, if there is any.
        discard: throw unfinished work away otherwise, instead of refusing.
        say: takes a note where there is nothing to resume.

    Raises:
        InputError: there is unfinished work that was not asked for or of other options, another process is at it, or
            the folder cannot be written.
    """
    folder = learning_folder_of(out)
    with unfinished.locked(folder):
        begun = (folder / STATE).is_file() and (folder / unfinished.OPTIONS).is_file()
        unfinished.begin(folder, options, begun=begun, resume=resume, discard=discard, say=say)
        try:
            yield folder
        except BaseException:
            if not (folder / STATE).is_file():
                shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder)
