"""The loop of a chat: a message, its answer or what a command does, until the user leaves."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from quantlab.cli.chat_commands import COMMANDS, ChatSession, Leave, run_command
from quantlab.cli.chat_input import next_message, read_pipe
from quantlab.cli.chat_terminal import Terminal, open_terminal

LEAVING_PRESSES = 3  # of Ctrl-C while an answer is being stopped


def converse(session: ChatSession, first: str | None, history: Path | None) -> None:
    """Take messages, `first` before those of the terminal or pipe.

    Raises:
        InputError: what comes by a pipe cannot be done; on a terminal the user is told and asked on.
        KeyboardInterrupt: Ctrl-C twice at an empty line, or once where there is no terminal.
    """
    try:
        if sys.stdin is not None and sys.stdin.isatty():
            with open_terminal(list(COMMANDS), history) as terminal:
                _by_terminal(session, terminal, first)
        else:
            message = next_message(read_pipe) if first is None else first
            while message is not None:
                _handle(session, message)
                message = next_message(read_pipe)
    except Leave:
        return


def _by_terminal(session: ChatSession, terminal: Terminal, first: str | None) -> None:
    from quantlab.errors import InputError

    message = first
    while True:
        try:
            message = message or _asked(session, terminal)
            if message is None:
                return
            with terminal.quiet(), _one_ctrl_c() as presses:
                try:
                    _handle(session, message)
                except KeyboardInterrupt:  # of a search, a file, what comes before an answer or behind it
                    if presses() >= LEAVING_PRESSES:
                        raise
                    session.view.note("[stopped]")
        except InputError as error:
            session.view.note(str(error))
        message = None


def _asked(session: ChatSession, terminal: Terminal) -> str | None:
    """A message from the terminal. Ctrl-C clears what has been typed; at an empty line the second one leaves."""
    presses = 0
    while True:
        try:
            return next_message(terminal.read)
        except KeyboardInterrupt:
            print(file=sys.stderr)
            presses = 1 if terminal.has_text() else presses + 1
            if presses > 1:
                raise
            session.view.note("[Ctrl-C again or Ctrl-D leaves]")


def _handle(session: ChatSession, message: str) -> None:
    """Answer a message, or do what it asks for behind a slash."""
    if message.startswith("/") and not message.startswith("//") and "\n" not in message:
        run_command(session, message)
        return
    question = message[1:] if message.startswith("//") else message
    session.answer(question)


@contextmanager
def _one_ctrl_c() -> Iterator[Callable[[], int]]:
    """While an answer comes, let the first Ctrl-C stop it. A second one was meant for the same; the third leaves.

    Yields how many there were.
    """
    previous, presses = signal.getsignal(signal.SIGINT), 0

    def heed(number: int, frame: FrameType | None) -> None:
        nonlocal presses
        presses += 1
        if presses in (1, LEAVING_PRESSES) and callable(previous):
            previous(number, frame)

    if not callable(previous):  # ignored, by whoever started us
        yield lambda: presses
        return
    signal.signal(signal.SIGINT, heed)
    try:
        yield lambda: presses
    finally:
        signal.signal(signal.SIGINT, previous)
