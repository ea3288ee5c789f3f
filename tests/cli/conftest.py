"""The command line within the test's process, and what it must do with a wrong request."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

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
