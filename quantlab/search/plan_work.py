"""What has been measured for a plan, in a folder: a run that was broken off goes on from it, another target too.

Every figure is one line of JSON, appended and synced as soon as it is known; a last line that was cut off is dropped.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from quantlab.checkpoint import unfinished
from quantlab.errors import InputError
from quantlab.search.measuring import Divergence

FIGURES = "figures.jsonl"


class PlanWork:
    """An open folder; see `open_plan_work`.

    Attributes:
        path: the folder.
        found: how many figures it held when it was opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._figures = dict(_read_figures(path / FIGURES))
        self.found = len(self._figures)

    def get(self, key: str) -> Divergence | None:
        """The figure of that key, if it has been measured."""
        return self._figures.get(key)

    def add(self, key: str, figure: Divergence) -> None:
        """Keep a figure."""
        row = {"key": key, "kld": figure.kld, "stderr": figure.stderr, "windows": figure.windows}
        descriptor = os.open(self.path / FIGURES, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, (json.dumps(row) + "\n").encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        self._figures[key] = figure


def plan_work_of(out: Path) -> Path:
    """Where the work for a plan of destination `out` is kept, unless the user says so."""
    return out.with_name(f"{out.name}.planning")


@contextlib.contextmanager
def open_plan_work(folder: Path, options: Mapping[str, Any], *, discard: bool) -> Iterator[PlanWork]:
    """The folder, locked.

    Args:
        options: JSON values that decide the figures; those of others are of no use.
        discard: throw such figures away instead of refusing.

    Raises:
        InputError: it holds figures of other options or is something else, another process is at it, or it cannot be
            written.
    """
    with unfinished.locked(folder, "choose another --plan-work"):
        if (folder / unfinished.OPTIONS).is_file():
            if differing := unfinished.difference(folder, options):
                if not discard:
                    key, before, now = differing
                    raise InputError(
                        f"{folder}: was measured with another {key.replace('_', ' ')} ({before}, now {now}); delete "
                        "it, or choose another --plan-work"
                    )
                unfinished.clear(folder)
        elif any(not entry.name.startswith(".") for entry in folder.iterdir()):
            raise InputError(f"{folder}: is a folder of something else; choose another --plan-work")
        unfinished.write_options(folder, options)
        _drop_torn_line(folder / FIGURES)
        yield PlanWork(folder)


def _drop_torn_line(path: Path) -> None:
    """What a killed run left of its last line."""
    if not path.is_file():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)


def _read_figures(path: Path) -> Iterator[tuple[str, Divergence]]:
    if not path.is_file():
        return
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            row = json.loads(line)
            yield str(row["key"]), Divergence(float(row["kld"]), float(row["stderr"]), int(row["windows"]))
        except (ValueError, KeyError, TypeError, RecursionError):
            raise InputError(f"{path}: line {number} is damaged; delete the line, or the file") from None
