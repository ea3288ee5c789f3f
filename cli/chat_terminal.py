"""Lines that are edited on a terminal, by the readline library where Python has it."""

from __future__ import annotations

import signal
import sys
import termios
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import ModuleType

from quantlab.cli.chat_input import CONTINUED, PROMPT, read_pipe
from quantlab.cli.chat_view import BOLD, RESET, has_style

HISTORY_LINES = 1000
_TICK = 0.1  # seconds that a Ctrl-C may wait for while a line is being read


@contextmanager
def open_terminal(words: Sequence[str], history: Path | None) -> Iterator[Terminal]:
    """Standard input as a terminal; lines are edited where standard output is one too.

    Args:
        words: that the Tab key completes at the beginning of a line.
        history: a file that keeps the lines from session to session; the arrow keys bring them back.

    Raises:
        InputError: the file cannot be read or written, or none can be kept.
    """
    readline = _readline() if sys.stdout.isatty() else None
    if history is not None:
        _read_history(readline, history)
    if readline is not None:
        readline.parse_and_bind("set enable-bracketed-paste on")  # several pasted lines are one
        readline.parse_and_bind("tab: complete")
        readline.set_completer_delims(" \t\n")
        readline.set_completer(lambda text, state: _completion(words, readline.get_line_buffer(), text, state))
    try:
        yield Terminal(readline)
    finally:
        if history is not None:
            _write_history(readline, history)


class Terminal:
    """Asks for lines."""

    def __init__(self, readline: ModuleType | None) -> None:
        self._continues = False
        self._typed: Callable[[], str] = str if readline is None else readline.get_line_buffer
        self._prompts = (PROMPT, CONTINUED)
        if readline is not None and has_style(sys.stdout):
            self._prompts = (_bold(PROMPT), _bold(CONTINUED))

    def read(self, continues: bool) -> str | None:
        """The next line; None at Ctrl-D. A paste of several lines is one.

        Raises:
            InputError: it is not UTF-8 text.
        """
        from quantlab.errors import InputError

        self._continues = continues
        if not sys.stdout.isatty():
            return read_pipe(continues)  # `input` would write its prompt to the answers
        try:
            with _ticking():
                line = input(self._prompts[continues])
            line.encode("utf-8")
        except EOFError:
            print(file=sys.stderr)
            return None
        except UnicodeError:  # Python stands surrogates in for bytes that are no UTF-8
            raise InputError("that is not UTF-8 text") from None
        return line

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Show nothing of what is typed meanwhile until a line is asked for; Ctrl-C throws none of it away, nor what
        has been written and is not on the screen yet.
        """
        modes = termios.tcgetattr(sys.stdin)
        local = modes[3] & ~termios.ECHO | termios.NOFLSH
        try:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, [*modes[:3], local, *modes[4:]])
            yield
        finally:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, modes)

    def has_text(self) -> bool:
        """Whether something had been typed when reading was broken off."""
        return self._continues or bool(self._typed())


@contextmanager
def _ticking() -> Iterator[None]:
    """Wake what waits for a key again and again, so that it looks for signals.

    Waiting ends by a signal that comes while it waits in this thread. One that comes a moment before, between the
    prompt and the waiting, or in another thread would be heeded at the next key only.
    """
    heed = signal.signal(signal.SIGALRM, lambda number, frame: None)
    signal.setitimer(signal.ITIMER_REAL, _TICK, _TICK)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, heed)


def _readline() -> ModuleType | None:
    try:
        import readline
    except ImportError:  # lines are edited as the system does it
        return None
    return readline


def _bold(prompt: str) -> str:
    # What lies between \001 and \002 takes no place on the line.
    return f"\001{BOLD}\002{prompt}\001{RESET}\002"


def _completion(words: Sequence[str], line: str, text: str, state: int) -> str | None:
    found = [word for word in words if line == text and text.startswith("/") and word.startswith(text)]
    return found[state] if state < len(found) else None


def _read_history(readline: ModuleType | None, file: Path) -> None:
    from quantlab.errors import InputError

    if readline is None:
        raise InputError("--history: lines are not edited here (output elsewhere, or no readline): leave it out")
    try:
        file.touch()  # what cannot be written at the end is refused now
        with file.open("rb") as opened:
            lines = sum(1 for _ in islice(opened, HISTORY_LINES + 1))
        if lines > HISTORY_LINES:
            raise InputError(
                f"{file}: has more than {HISTORY_LINES} lines, so it is no history of ours; name another file"
            )
        readline.read_history_file(file)
    except OSError as error:
        raise InputError(f"{file}: cannot be read and written: {error.strerror}") from None


def _write_history(readline: ModuleType | None, file: Path) -> None:
    from quantlab.errors import InputError

    assert readline is not None, "refused before"
    readline.set_history_length(HISTORY_LINES)
    try:
        readline.write_history_file(file)
    except OSError as error:
        raise InputError(f"{file}: cannot be written: {error.strerror}") from None
