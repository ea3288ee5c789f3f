"""What commands show: units people read, JSON that every parser takes, progress that stays on stderr."""

from __future__ import annotations

import io
import json
import math
import re
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from quantlab.cli import console

from quantlab.errors import InputError


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_949, "999.9 kB"),
        (17_800_000, "17.8 MB"),
        (1_000_000_000, "1.00 GB"),
        (5_368_709_120, "5.37 GB"),
        (2_000_000_000_000, "2000.00 GB"),
    ],
)
def test_bytes_have_decimal_units(count: int, words: str) -> None:
    """1 kB is 1000 B; units end at GB."""
    assert console.human_bytes(count) == words


@dataclass(frozen=True)
class Inner:
    value: float


@dataclass(frozen=True)
class Outer:
    text: str
    number: float
    inner: tuple[Inner, ...]


def test_speed_counts_from_where_work_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is prepared before the first unit is done is no part of it."""
    now = iter([0.0, 50.0, 60.0, 70.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(now))
    meter = console._Meter()
    assert [meter.speed(done) for done in (3, 3, 5, 7)] == [0.0, 0.0, 0.2, 0.2]


def test_json_is_one_object_without_nan(capsys: pytest.CaptureFixture[str]) -> None:
    """Nested results become one line that a strict parser reads; NaN and infinities become null, text stays text."""
    console.print_json(Outer('na\u00efve "quoted"\n', math.nan, (Inner(math.inf), Inner(-math.inf), Inner(1.5))))
    out, err = capsys.readouterr()
    assert err == ""
    assert out.count("\n") == 1

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    assert json.loads(out, parse_constant=refuse) == {
        "text": 'na\u00efve "quoted"\n',
        "number": None,
        "inner": [{"value": None}, {"value": None}, {"value": 1.5}],
    }


def test_tables_do_not_wrap_or_colour_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Columns line up, numbers to the right; a long name stays on one line, for grep's sake."""
    name = "model.layers.0." + "x" * 100
    console.print_table(("tensor", "bytes"), [(name, "5"), ("b", "1234")])
    out = capsys.readouterr().out
    assert "\x1b" not in out
    lines = [line.rstrip() for line in out.splitlines()]
    assert lines == ["tensor".ljust(115) + "  bytes", name + "      5", "b".ljust(115) + "   1234"]


class Clock:
    """Time that passes when it is told to."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The time that speeds and intervals are measured with."""
    clock = Clock()
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


def test_without_a_terminal_progress_is_a_line_now_and_then(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """A report a second for 100 s makes three lines, one per 30 s, with speed and time left, all of them on stderr."""
    with console.progress("quantizing", "weights") as report:
        for second in range(100):
            report(2000 * second, 200_000, "layer")
            clock.now += 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "quantizing: 60000/200000, 2k weights/s, 1.2 min left  layer",
        "quantizing: 120000/200000, 2k weights/s, 0.7 min left  layer",
        "quantizing: 180000/200000, 2k weights/s, 0.2 min left  layer",
    ]


def test_a_quick_command_prints_no_progress(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """What ends within the first interval leaves stderr empty: one line of error stays one line."""
    with console.progress("quantizing", "weights") as report:
        for done in range(10):
            report(done, 10, "")
            clock.now += 2.9
    assert capsys.readouterr() == ("", "")


def test_speed_counts_from_the_first_report(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """A resumed run begins in the middle: what was done before is not counted as speed."""
    with console.progress("training", "tokens") as report:
        report(500_000, 1_000_000, "")
        clock.now += 50
        report(600_000, 1_000_000, "loss 4.000")
    assert capsys.readouterr().err == "training: 600000/1000000, 2k tokens/s, 3.3 min left  loss 4.000\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def draw_bar(clock: Clock, monkeypatch: pytest.MonkeyPatch, **environment: str) -> str:
    """What a stderr that is a terminal 120 columns wide receives from a bar at three quarters."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm-256color", "COLUMNS": "120", **environment}.items():
        monkeypatch.setenv(name, value)
    terminal = Terminal()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        with console.progress("perplexity", "tokens") as report:
            report(0, 4000, "")
            clock.now += 2
            report(3000, 4000, "perplexity 12.345")
    return terminal.getvalue()


def test_a_terminal_shows_a_bar_with_speed_and_time_left(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Label, share, speed in the command's own unit, times, and the figure so far; nothing on stdout."""
    drawn = draw_bar(clock, monkeypatch)
    frames = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn).strip())
    line = r"perplexity \S+ +75% 1\.5k tokens/s \d:\d\d:\d\d left (\d:\d\d:\d\d|-:--:--) perplexity 12\.345"
    assert re.fullmatch(line, frames[-1])
    assert capsys.readouterr().out == ""


def test_a_bar_goes_when_its_work_is_done(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last thing drawn is an erased line, so that the result stands alone."""
    assert draw_bar(clock, monkeypatch).endswith("\x1b[2K")


COLOUR = re.compile(r"\x1b\[(?:[0-9;]*;)?(?:3[0-8]|9[0-7])[;m]")


def test_no_color_is_honoured(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bar is coloured by default, and is not where NO_COLOR is set."""
    assert COLOUR.search(draw_bar(clock, monkeypatch))
    plain = draw_bar(clock, monkeypatch, NO_COLOR="1")
    assert "perplexity 12.345" in plain
    assert not COLOUR.search(plain)


@pytest.mark.parametrize(
    ("value", "words"),
    [(0, "0"), (12.345, "12.3"), (999, "999"), (1000, "1k"), (25_300, "25.3k"), (4e6, "4M"), (7.25e9, "7.25G")],
)
def test_speeds_have_three_digits(value: float, words: str) -> None:
    """Large numbers take k, M or G."""
    assert console._quantity(value) == words


@pytest.mark.parametrize("count", [0, -1])
def test_threads_must_be_at_least_one(count: int) -> None:
    """torch is not asked for zero threads."""
    with pytest.raises(InputError, match=f"--threads {count}: at least 1 is needed"):
        console.use_threads(count)
