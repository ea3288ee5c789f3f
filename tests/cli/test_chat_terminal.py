"""`quantlab chat` on a pseudo-terminal: editing, Ctrl-C, Ctrl-D, as a user meets them."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from command_processes import PATIENCE, QUANTLAB, environment, heed_ctrl_c

CTRL_C, CTRL_D = "\x03", "\x04"
PASTE = "\x1b[200~{}\x1b[201~"  # how a terminal marks what is pasted
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\x07")


class Screen:
    """A process on a pseudo-terminal."""

    def __init__(self, process: subprocess.Popen[bytes], master: int) -> None:
        self.process, self._master = process, master
        self._seen, self._read_until = "", 0

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def expect(self, text: str) -> str:
        """Wait until `text` (a regular expression) appears behind what has been expected before; what it matched."""
        deadline = time.monotonic() + PATIENCE
        while not (found := re.compile(text).search(self._seen, self._read_until)):
            assert time.monotonic() < deadline, f"{text!r} is not in {self._seen[self._read_until :]!r}"
            if select.select([self._master], [], [], 0.5)[0]:
                try:
                    self._seen += CONTROL.sub("", os.read(self._master, 4096).decode(errors="replace"))
                except OSError:  # the process has ended
                    raise AssertionError(
                        f"{text!r} is not in {self._seen[self._read_until :]!r}, and that is all"
                    ) from None
        self._read_until = found.end()
        return found.group()

    def answer(self, prompt: str, keys: str) -> None:
        """Type when asked. What is typed earlier is on the screen twice, and the first time before anybody reads it."""
        self.expect(prompt)
        self.type(keys)


def take_terminal() -> None:
    """As a login shell does: Ctrl-C on the terminal is for this process."""
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    heed_ctrl_c()


def chatting(model: Path, *arguments: object) -> AbstractContextManager[Screen]:
    return on_terminal(*QUANTLAB, "chat", str(model), "-t", "1", *map(str, arguments))


@contextmanager
def on_terminal(*command: str) -> Iterator[Screen]:
    master, terminal = pty.openpty()
    with subprocess.Popen(
        command, stdin=terminal, stdout=terminal, stderr=terminal, preexec_fn=take_terminal,
        env=environment(TERM="xterm", NO_COLOR="1", INPUTRC="/dev/null"),
    ) as process:  # fmt: skip
        os.close(terminal)
        try:
            yield Screen(process, master)
        finally:
            process.kill()
            os.close(master)


@pytest.fixture(scope="module")
def endless(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that goes on until it is stopped: no end token, and a context for minutes."""
    model = make_model(tmp_path_factory.mktemp("endless") / "model", "llama", max_position_embeddings=1 << 17)
    for name in ("tokenizer_config.json", "generation_config.json"):
        (model / name).unlink(missing_ok=True)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "eos_token_id": None}))
    return model


def test_a_session(endless: Path, tmp_path: Path) -> None:
    """All that a terminal adds, in one process: several lines, a paste, what stops an answer and does not leave."""
    file, history = tmp_path / "talk.json", tmp_path / "history"
    with chatting(endless, "-n", 5, "--temp", 0, "--history", history) as screen:
        screen.expect(r"native engine, context of 4096 tokens; /help lists commands\]\n")
        screen.expect("no chat template")
        screen.answer("> ", "one\\\n")
        screen.answer(r"\.\.\. ", "two\n")
        screen.expect(r"\[\d+ prompt tokens at \d+/s, 5 generated at [\d.]+/s, cut at 5: /set max-tokens")
        screen.answer("\n> ", PASTE.format("three\nfour"))
        screen.type("\n")
        screen.expect(r"\[\d+ prompt tokens \(\d+ cached\)")
        screen.answer("\n> ", "/nothing\n")  # told, and the chat goes on
        screen.expect("/nothing: no such command")
        screen.answer("\n> ", "/se\t\n")  # Tab offers /set
        screen.expect("max-tokens 5")
        screen.answer("\n> ", "a word")
        screen.expect("a word")
        screen.type(CTRL_C)  # takes the words away
        screen.expect(r"\[Ctrl-C again or Ctrl-D leaves\]")
        screen.answer("\n> ", "another")
        screen.expect("another")
        screen.type(CTRL_C)  # these too, and does not leave
        screen.expect(r"\[Ctrl-C again or Ctrl-D leaves\]")
        screen.answer("\n> ", "/set max-tokens 100000\n")
        screen.expect("max-tokens 100000\n")
        screen.answer("> ", "five\n")
        screen.expect("five\n.")
        screen.type("/undo\n")  # seen when it is its turn
        screen.type(CTRL_C)
        shown = screen.expect(r"(.|\n)*\[stopped\]\n> /undo\n\[forgotten: five\]")
        assert shown.count("/undo") == 1
        screen.answer("\n> ", "/retry\n")
        screen.expect("at temperature 0 every seed gives the same answer.*\n.")
        screen.type(CTRL_C + CTRL_C)  # the second one, a moment too late, does not leave
        screen.expect(r"\[stopped\]")
        screen.answer("\n> ", f"/save {file}\n")
        screen.expect(r"\[4 messages in (.|\n)*> ")
        screen.type(CTRL_D)
        assert screen.process.wait(PATIENCE) == 0
    messages = json.loads(file.read_text())["messages"]
    assert [m["content"] for m in messages if m["role"] == "user"] == ["one\ntwo", "three\nfour"]
    assert all(messages[at]["content"] for at in (1, 3))  # the stopped one is kept as far as it came
    assert "/undo" in history.read_text().splitlines()


def test_ctrl_c_twice_leaves(endless: Path) -> None:
    with chatting(endless, "-p", "Hi", "-n", 3) as screen:
        screen.expect("3 generated")
        screen.expect("> ")
        screen.type(CTRL_C)
        screen.expect(r"\[Ctrl-C again or Ctrl-D leaves\]\n> ")
        screen.type(CTRL_C)
        screen.expect("quantlab: interrupted; nothing was left half-written\n")
        assert screen.process.wait(PATIENCE) == 130


LATE_CTRL_C = """
import signal, threading, time
from quantlab.cli.chat_terminal import open_terminal

def press():  # a signal in this thread wakes no other one
    time.sleep(0.3)
    signal.pthread_kill(threading.get_ident(), signal.SIGINT)

with open_terminal([], None) as terminal:
    threading.Thread(target=press, daemon=True).start()
    try:
        terminal.read(False)
    except KeyboardInterrupt:
        print("heeded", signal.getitimer(signal.ITIMER_REAL), signal.getsignal(signal.SIGALRM))
    print("typed:", terminal.read(False))
"""


def test_ctrl_c_is_heeded_when_it_does_not_break_off_the_waiting() -> None:
    with on_terminal(sys.executable, "-c", LATE_CTRL_C) as screen:
        screen.expect(r"heeded \(0\.0, 0\.0\) 0")
        screen.expect("> ")
        time.sleep(0.3)  # a few ticks
        screen.type("words\n")
        screen.expect("typed: words")
