"""Interruptions, readers that go early, defects: a clean end, one line, nothing left behind."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_processes import PATIENCE, QUANTLAB, Run, environment, heed_ctrl_c, quantlab_process


def test_a_defect_is_one_line_and_status_1(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is nobody's input is said to be unexpected, with the way to its traceback."""

    def broken(path: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.delenv("QUANTLAB_TRACEBACK", raising=False)
    monkeypatch.setattr("quantlab.checkpoint.summary.summarize", broken)
    outcome = run("inspect", "model")
    assert outcome.status == 1
    assert outcome.err.startswith("quantlab: unexpected ZeroDivisionError: division by zero (QUANTLAB_TRACEBACK=1")
    assert outcome.err.count("\n") == 1


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[Any]) -> None:
    """Wait for a sign of life of a process that must not end before it."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, "ended too early"
        assert time.monotonic() < deadline, "hung"
        time.sleep(0.01)


@contextlib.contextmanager
def started(*arguments: object, **options: Any):
    """A running command, killed at the end if it is still there."""
    command = [*QUANTLAB, *map(str, arguments)]
    with subprocess.Popen(command, env=environment(), preexec_fn=heed_ctrl_c, **options) as process:
        try:
            yield process
        finally:
            process.kill()


def write_endless_model(folder: Path) -> Path:
    """A Llama of 400 million weights that takes no space: its safetensors file is a hole behind its header."""
    side, layers = 4096, 24
    config = {"model_type": "llama", "hidden_size": side, "num_hidden_layers": layers, "num_attention_heads": 32,
              "vocab_size": 32, "tie_word_embeddings": True}  # fmt: skip
    shapes = {f"model.layers.{layer}.self_attn.q_proj.weight": [side, side] for layer in range(layers)}
    header, offset = {}, 0
    for name, (rows, columns) in {"model.embed_tokens.weight": [32, side], **shapes}.items():
        end = offset + 2 * rows * columns
        header[name] = {"dtype": "F16", "shape": [rows, columns], "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + offset)
    return folder


@pytest.mark.parametrize(
    ("number", "status", "line"),
    [
        (signal.SIGINT, 130, "quantlab: interrupted; nothing was left half-written\n"),
        (signal.SIGTERM, 143, ""),
    ],
)
def test_a_stopped_quantize_leaves_nothing(tmp_path: Path, number: int, status: int, line: str) -> None:
    """Stopped while it writes: no OUT, no hidden partial folder, and the status that shells expect."""
    model, out = write_endless_model(tmp_path / "model"), tmp_path / "out"
    partial = tmp_path / ".out.partial" / "model.safetensors"
    with started("quantize", model, out, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_until(partial.exists, process)
        process.send_signal(number)
        printed = process.communicate(timeout=PATIENCE)
    assert process.returncode == status
    assert printed == ("", line)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(("signal_name", "ended"), [("SIGINT", "KeyboardInterrupt()"), ("SIGTERM", "SystemExit(143)")])
def test_a_signal_waits_for_the_end_of_an_import(signal_name: str, ended: str, tmp_path: Path) -> None:
    """Half a torch crashes the process."""
    (tmp_path / "slow.py").write_text(
        f"import os, signal, time\nos.kill(os.getpid(), signal.{signal_name})\ntime.sleep(0.1)\ncomplete = True\n"
    )
    program = (
        "import signal, sys, time\n"
        "from quantlab.cli.signals import heed_signals\n"
        f"signal.signal(signal.SIGINT, signal.default_int_handler)\nsys.path.insert(0, {str(tmp_path)!r})\n"
        "heed_signals()\n"
        f"try:\n    import slow\n    time.sleep({PATIENCE})\n"
        "except BaseException as error:\n    print(repr(error), sys.modules['slow'].complete)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert (done.stdout, done.stderr) == (f"{ended} True\n", "")


def test_a_signal_that_the_parent_has_ignored_stays_ignored() -> None:
    program = (
        "import os, signal\nfrom quantlab.cli.signals import heed_signals\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\nheed_signals()\n"
        "os.kill(os.getpid(), signal.SIGINT)\nprint('alive')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert (done.stdout, done.stderr) == ("alive\n", "")


def test_a_stopped_generate_ends_with_130(make_model: Callable[..., Path], tmp_path: Path) -> None:
    """Ctrl-C while text streams: what was written stays on stdout, stderr holds one line."""
    model = make_model(tmp_path / "model", "llama", max_position_embeddings=1 << 17)
    for name in ("tokenizer_config.json", "generation_config.json"):  # no end token: the text never ends by itself
        (model / name).unlink(missing_ok=True)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "eos_token_id": None}))
    command = ("generate", model, "-p", "Once upon", "-n", 100_000, "--temp", 0)
    with started(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        first = process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, line = process.communicate(timeout=PATIENCE)
    assert first
    assert process.returncode == 130
    assert line.decode() == "quantlab: interrupted; nothing was left half-written\n"


def test_a_terminal_sees_progress_and_ctrl_c_ends_it(llama_model: Path, prose: Path, tmp_path: Path) -> None:
    """On a terminal, perplexity draws its bar with speed, time left and the figure so far; Ctrl-C ends with 130."""
    long_text = tmp_path / "long.txt"
    long_text.write_bytes(prose.read_bytes() * 100)
    master, terminal = pty.openpty()
    command = ("perplexity", llama_model, long_text, "--context", 64)
    with (
        os.fdopen(master, "rb", buffering=0) as screen,
        started(*command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=terminal) as process,
    ):
        os.close(terminal)
        seen = b""
        while not re.search(rb"tokens/s.*left.*\d:\d\d:\d\d.*perplexity \d+\.\d", seen):
            seen += screen.read(4096)  # an OSError here: the process ended too early
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):  # the terminal's other end closes with the process
            while piece := screen.read(4096):
                seen += piece
        out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert out == b""
    assert b"quantlab: interrupted; nothing was left half-written" in seen
    assert b"Traceback" not in seen


@pytest.mark.parametrize(
    "arguments",
    [("inspect",), ("inspect", "--json"), ("--help",), ("generate", "-p", "a", "-n", "3")],
    ids=["table", "json", "help", "generate"],
)
def test_a_reader_that_goes_early_is_no_traceback(llama_model: Path, arguments: tuple[str, ...]) -> None:
    """`quantlab ... | head -c 1`: stdout is closed before all is written; stderr stays empty."""
    read, write = os.pipe()
    os.close(read)  # a reader that has gone already is the hardest case
    model = [] if arguments == ("--help",) else [llama_model]
    with os.fdopen(write, "wb") as stdout:
        done = subprocess.run(
            [*QUANTLAB, *arguments, *map(str, model)], stdout=stdout, stderr=subprocess.PIPE, text=True,
            timeout=PATIENCE, env=environment(),
        )  # fmt: skip
    assert done.stderr == ""
    assert done.returncode == 1


def test_errors_of_the_installed_command(tmp_path: Path) -> None:
    """What `main` does with a wrong request, in a process of its own: status 2, one line, nothing on stdout."""
    done = quantlab_process("inspect", tmp_path / "absent")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"quantlab: {tmp_path / 'absent'}: no such folder or file\n"
