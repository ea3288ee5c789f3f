"""What commands show: progress on stderr, tables and JSON on stdout."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

Progress = Callable[[int, int, str], None]
LINE_SECONDS = 30  # between progress lines where there is no terminal


def print_json(result: Any) -> None:  # Any: a dataclass of the library
    """Print a result as one JSON object."""
    print(json.dumps(_plain(dataclasses.asdict(result)), allow_nan=False))


def _plain(value: Any) -> Any:
    """JSON has no NaN or infinity: null stands for them."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> None:
    """Print a table; columns after the first are aligned to the right."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))  # as they are: [square brackets] and :words: in a name are no markup
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=200)
    console.print(table)


def print_notes(notes: Sequence[str]) -> None:
    """What the user should know of a result, a line each."""
    for note in notes:
        print(f"note: {note}")


def human_bytes(count: float) -> str:
    """Bytes with a decimal unit."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


@contextlib.contextmanager
def progress(label: str, unit: str) -> Iterator[Progress]:
    """A callback (done, total, note) that draws a bar with speed and time left, or plain lines without a terminal."""
    if sys.stderr.isatty():
        with _bar(label, unit) as report:
            yield report
    else:
        yield _lines(label, unit)


@contextlib.contextmanager
def _bar(label: str, unit: str) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[speed]}"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    with RichProgress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None, speed="", note="")
        meter = _Meter()

        def report(done: int, total: int, note: str) -> None:
            bar.update(task, completed=done, total=total, speed=f"{_quantity(meter.speed(done))} {unit}/s", note=note)

        yield report


def _lines(label: str, unit: str) -> Progress:
    meter, last = _Meter(), time.monotonic()

    def report(done: int, total: int, note: str) -> None:
        nonlocal last
        speed = meter.speed(done)
        if time.monotonic() - last < LINE_SECONDS:
            return
        last = time.monotonic()
        left = f", {(total - done) / speed / 60:.1f} min left" if speed else ""
        line = f"{label}: {done}/{total}, {_quantity(speed)} {unit}/s{left}  {note}"
        print(line.rstrip(), file=sys.stderr, flush=True)

    return report


class _Meter:
    """Speed since the last report of what the first one said, which need not be zero (a resumed run)."""

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None

    def speed(self, done: int) -> float:
        now = time.monotonic()
        if self._first is None or done == self._first[0]:
            self._first = (done, now)
        first_done, first_time = self._first
        return (done - first_done) / (now - first_time) if now > first_time else 0.0


def _quantity(value: float) -> str:
    for suffix in ("", "k", "M"):
        if abs(value) < 1000:
            return f"{value:.3g}{suffix}"
        value /= 1000
    return f"{value:.3g}G"


def check_threads(count: int | None) -> None:
    """Refuse to compute with no thread."""
    from quantlab.errors import InputError

    if count is not None and count < 1:
        raise InputError(f"--threads {count}: at least 1 is needed")


def use_threads(count: int | None) -> None:
    """Let torch compute with `count` threads."""
    check_threads(count)
    if count is None:
        return
    import torch

    torch.set_num_threads(count)


def quiet_transformers() -> None:
    """Our bars and errors only: transformers' own would double them."""
    import warnings

    from transformers.utils import logging

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # about its own names
    logging.disable_progress_bar()
    logging.set_verbosity_error()
