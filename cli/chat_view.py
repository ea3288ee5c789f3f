"""What a chat shows: answers as they are written on stdout, everything else on stderr."""

from __future__ import annotations

import os
import re
import string
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from quantlab.generation.chat import Answer

DIM, BOLD, RESET = "\x1b[2m", "\x1b[1m", "\x1b[0m"
ERASE = "\r\x1b[K"  # the line that the cursor is on
LONG_REQUEST = 500  # tokens
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and line break: what a terminal would obey
_HELD_BACK = string.whitespace + "\ufffd"  # at the end of an answer it is left out, half a character too


def has_style(stream: TextIO) -> bool:
    """Whether text on it may be bold or dim (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


class ChatView:
    """Answers and remarks. With `--json` answers are shown on a terminal only, by stderr."""

    def __init__(self, json: bool) -> None:
        self._answers = sys.stderr if json else sys.stdout
        self._shows = not json or sys.stderr.isatty()
        self._is_terminal = self._answers.isatty()
        self._has_text, self._spaces = False, ""
        self._is_reading = False

    def reading(self, done: int, total: int) -> None:
        """Show on a terminal how far the reading of a long request is."""
        if sys.stderr.isatty() and total >= LONG_REQUEST:
            self._is_reading = True
            print(f"\r[reading: {done} of {total} tokens]", end="", file=sys.stderr, flush=True)

    def piece(self, text: str) -> None:
        """Show a piece of an answer; white space around the whole is left out."""
        text = self._spaces + text
        shown = text.rstrip(_HELD_BACK)
        self._spaces = text[len(shown) :]
        if not shown or not self._shows:
            return
        if not self._has_text:
            shown = shown.lstrip()
        self._has_text = True
        self._end_reading()
        if self._is_terminal:
            shown = _CONTROL.sub("\ufffd", shown)
        print(shown, end="", file=self._answers, flush=True)

    def end(self, answer: Answer, max_tokens: int, first_seed: int) -> None:
        """End an answer, with its speed on a terminal, and its seed where that is not the first one."""
        self._end_reading()
        if self._has_text or (self._shows and answer.timings is not None):  # an empty answer is an empty line
            print(file=self._answers, flush=True)
        self._has_text, self._spaces = False, ""
        seed = [f"seed {answer.seed}"] if answer.seed != first_seed else []
        if answer.finish_reason == "stopped":
            self.note("[stopped]" if answer.text else "[stopped before the first word; the message was not kept]")
        elif sys.stderr.isatty():
            self.note(f"[{', '.join([*_speeds(answer, max_tokens), *seed])}]\n")
        elif seed:
            self.note(f"[{seed[0]}]")

    def _end_reading(self) -> None:
        """Take the line away that told of it."""
        if self._is_reading:
            print(ERASE, end="", file=sys.stderr, flush=True)
        self._is_reading = False

    def note(self, text: str) -> None:
        """A remark, on a line of its own."""
        if sys.stderr.isatty():
            text = _CONTROL.sub("\ufffd", text)
        print(f"{DIM}{text}{RESET}" if has_style(sys.stderr) else text, file=sys.stderr, flush=True)


def _speeds(answer: Answer, max_tokens: int) -> list[str]:
    timings = answer.timings
    assert timings is not None, "a stopped answer has none"
    cached = f" ({timings.cached_tokens} cached)" if timings.cached_tokens else ""
    parts = [
        f"{timings.prompt_tokens} prompt tokens{cached} at {timings.prefill_tokens_per_second:.0f}/s",
        f"{timings.generated_tokens} generated at {timings.decode_tokens_per_second:.1f}/s",
    ]
    if answer.finish_reason == "length":
        full = timings.generated_tokens < max_tokens
        parts.append("cut: the context is full" if full else f"cut at {max_tokens}: /set max-tokens")
    return parts
