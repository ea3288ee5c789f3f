"""The command line within the test's process, and what it must do with a wrong request."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from command_processes import Quantized, quantlab_process
from hostile_models import Run

from quantlab import cli


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one JSON object on stdout, and nothing beside it."""
        assert self.status == 0, self.err
        value = json.loads(self.out)
        assert isinstance(value, dict)
        return value


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """The command line within this process: all that `main` does but its signal handler."""
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["quantlab", *map(str, arguments)])
        status = cli._run()
        return Outcome(status, *capsys.readouterr())

    return run


@pytest.fixture
def refusal(run: Callable[..., Outcome]) -> Callable[..., str]:
    """A function (arguments) -> the one line of a command that ends with status 2, without `quantlab: `."""

    def refusal(*arguments: object) -> str:
        outcome = run(*arguments)
        assert outcome.status == 2, outcome.err
        assert outcome.out == ""
        assert outcome.err.startswith("quantlab: ")
        assert outcome.err.count("\n") == 1
        assert outcome.err.endswith("\n")
        assert "Traceback" not in outcome.err
        return outcome.err.removeprefix("quantlab: ").rstrip("\n")

    return refusal


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory, prose: Path) -> Path:
    """The first 40 lines of the prose."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("".join(prose.read_text(encoding="utf-8").splitlines(keepends=True)[:40]), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def quantized(llama_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    """The tiny Llama as `quantlab quantize MODEL OUT --json` makes it."""
    out = tmp_path_factory.mktemp("quantized") / "out"
    done = quantlab_process("quantize", llama_model, out, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    return Quantized(out, json.loads(done.stdout))


@pytest.fixture
def refusals(refusal: Callable[..., str], tmp_path_factory: pytest.TempPathFactory, prose: Path) -> Run:
    """A function (model, commands) -> the one line in which these commands, or all, refuse it, and make nothing."""
    out = tmp_path_factory.mktemp("out")

    def refusals(model: Path, *commands: str) -> str:
        options: dict[str, list[object]] = {
            "inspect": [model],
            "generate": [model, "-p", "a"],
            "perplexity": [model, prose, "--context", 16],
            "compare": [model, model, prose, "--context", 16, "--engine", "torch"],
            "quantize": [model, out / "folder"],
            "export": [model, out / "file.gguf", "--to", "gguf"],
        }
        lines = {refusal(command, *options[command]) for command in commands or options}
        assert list(out.iterdir()) == []
        assert len(lines) == 1, lines
        line = lines.pop()
        assert line.isprintable(), line  # nothing that a terminal would obey
        return line

    return refusals
