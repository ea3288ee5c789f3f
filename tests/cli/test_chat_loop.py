"""The loop of a chat on a terminal: what Ctrl-C stops, and what it leaves."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from quantlab.cli import chat_loop, chat_terminal

from quantlab.errors import InputError


class FakeTerminal:
    """Gives lines, and None behind them."""

    def __init__(self, *lines: str) -> None:
        self._lines = iter(lines)

    def read(self, continues: bool) -> str | None:
        return next(self._lines, None)

    def has_text(self) -> bool:
        return False

    @contextmanager
    def quiet(self) -> Iterator[None]:
        yield


@pytest.fixture
def heeded() -> Iterator[None]:
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


def session_of(presses: int) -> tuple[Any, list[str], list[str]]:
    """A session that Ctrl-C comes to so often while it searches for the first question."""
    asked: list[str] = []
    notes: list[str] = []

    def answer(question: str) -> None:
        asked.append(question)
        if len(asked) == 1:
            for _ in range(presses):
                try:
                    os.kill(os.getpid(), signal.SIGINT)
                except KeyboardInterrupt:
                    caught = True
            if caught:
                raise KeyboardInterrupt

    return SimpleNamespace(answer=answer, view=SimpleNamespace(note=notes.append)), asked, notes


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_stops_whatever_a_message_began(heeded: None, presses: int) -> None:
    """A search as well as an answer; the chat goes on."""
    session, asked, notes = session_of(presses)
    chat_loop._by_terminal(session, FakeTerminal("one", "two"), None)  # type: ignore[arg-type]
    assert (asked, notes) == (["one", "two"], ["[stopped]"])


def test_the_third_ctrl_c_leaves(heeded: None) -> None:
    session, asked, notes = session_of(chat_loop.LEAVING_PRESSES)
    with pytest.raises(KeyboardInterrupt):
        chat_loop._by_terminal(session, FakeTerminal("one", "two"), None)  # type: ignore[arg-type]
    assert (asked, notes) == (["one"], [])


def test_a_history_that_cannot_be_kept_is_refused_at_the_beginning(tmp_path: Any) -> None:
    readline = SimpleNamespace(read_history_file=lambda file: None)
    with pytest.raises(InputError, match="history: cannot be read and written: No such file"):
        chat_terminal._read_history(readline, tmp_path / "nowhere" / "history")  # type: ignore[arg-type]


def test_a_long_file_is_no_history(tmp_path: Any) -> None:
    """It would be cut at its end."""
    book, read = tmp_path / "book", []
    readline = SimpleNamespace(read_history_file=read.append)
    book.write_text("a line\n" * (chat_terminal.HISTORY_LINES + 1))
    with pytest.raises(InputError, match="has more than 1000 lines, so it is no history of ours; name another file"):
        chat_terminal._read_history(readline, book)  # type: ignore[arg-type]
    book.write_text("a line\n" * chat_terminal.HISTORY_LINES)
    chat_terminal._read_history(readline, book)  # type: ignore[arg-type]
    assert read == [book]
