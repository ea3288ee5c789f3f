r"""Messages from a terminal or a pipe: lines, lines joined by a \ at their ends, blocks between triple quotes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import BinaryIO

PROMPT, CONTINUED = "> ", "... "
QUOTES = '"""'

ReadLine = Callable[[bool], str | None]  # whether the line continues a message -> the line, None at the end


def next_message(read_line: ReadLine) -> str | None:
    """The next message, without the marks that made its lines one; empty ones are passed over. None at the end.

    Raises:
        InputError: a block has no end.
    """
    while (line := read_line(False)) is not None:
        message = _block(line, read_line) if line.lstrip().startswith(QUOTES) else _continued(line, read_line)
        if message.strip():
            return message.strip("\n")
    return None


def _block(line: str, read_line: ReadLine) -> str:
    from quantlab.errors import InputError

    lines = [line.lstrip().removeprefix(QUOTES)]
    while not lines[-1].rstrip().endswith(QUOTES):
        following = read_line(True)
        if following is None:
            raise InputError(f"the block that begins with {QUOTES} has no end: a line that ends with {QUOTES}")
        lines.append(following)
    lines[-1] = lines[-1].rstrip().removesuffix(QUOTES)
    return "\n".join(lines)


def _continued(line: str, read_line: ReadLine) -> str:
    lines = [line]
    while lines[-1].endswith("\\"):
        following = read_line(True)
        lines[-1] = lines[-1].removesuffix("\\")
        if following is None:
            break
        lines.append(following)
    return "\n".join(lines)


def read_pipe(continues: bool) -> str | None:
    """The next line of standard input; on a terminal whose output goes elsewhere, behind a prompt on stderr.

    Raises:
        InputError: it is closed, or no UTF-8 text.
    """
    stdin = _standard_input()
    if sys.stdin.isatty():
        print(CONTINUED if continues else PROMPT, end="", file=sys.stderr, flush=True)
    line = _decoded(stdin.readline())
    return line.removesuffix("\n").removesuffix("\r") if line else None


def read_all() -> str | None:
    """Standard input as one message; None where it holds nothing but white space.

    Raises:
        InputError: it is closed, or no UTF-8 text.
    """
    text = _decoded(_standard_input().read())
    return text.strip("\n") if text.strip() else None


def _standard_input() -> BinaryIO:
    from quantlab.errors import InputError

    if sys.stdin is None:
        raise InputError("standard input is closed; messages come from there")
    return sys.stdin.buffer


def _decoded(data: bytes) -> str:
    from quantlab.errors import InputError

    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise InputError("standard input is not UTF-8 text") from None
