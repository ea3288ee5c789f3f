"""`quantlab serve`: what it says at the start, how it ends, and what it refuses to start with."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_processes import PATIENCE, QUANTLAB, environment, heed_ctrl_c

NO_END = {"logit_bias": {"2": -1000}}


@contextlib.contextmanager
def served(model: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], int, str]]:
    """A server as a process of its own, its port, and its first line."""
    command = [*QUANTLAB, "serve", str(model), "--port", "0", "-t", "1", *options]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment(), preexec_fn=heed_ctrl_c, **pipes) as process:
        try:
            line = process.stderr.readline()
            found = re.search(r"http://127\.0\.0\.1:(\d+)$", line)
            assert found, line + process.stderr.read()
            yield process, int(found[1]), line.rstrip("\n")
        finally:
            process.kill()


def begin(port: int, max_tokens: int, **fields: Any) -> http.client.HTTPConnection:
    """Send a request, whose answer is still to be read."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    asked = {"prompt": "The sea", "max_tokens": max_tokens, **NO_END, **fields}
    connection.request("POST", "/v1/completions", json.dumps(asked))
    return connection


@pytest.fixture(scope="module")
def long_model(make_model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama that can write for long."""
    return make_model(tmp_path_factory.mktemp("served") / "tiny", "llama", max_position_embeddings=65536)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_running_answer_end(long_model: Path, number: int) -> None:
    """The first line says model, engine, context and address; the end is status 0, and nothing went to stdout."""
    with served(long_model, "--grace", "1000", "--context", "65536") as (process, port, line):
        assert line.startswith("quantlab serve: tiny, native engine, context of 65536 tokens, http://127.0.0.1:")
        connection = begin(port, 2000, stream=True)
        reply = connection.getresponse()
        assert reply.status == 200
        process.send_signal(number)
        events = reply.read().decode("utf-8").split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        assert json.loads(events[-3].removeprefix("data: "))["timings"]["predicted_n"] == 2000
        out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (0, "")
    told = json.loads(err)
    assert (told["path"], told["status"], told["completion_tokens"]) == ("/v1/completions", 200, 2000)


@pytest.mark.parametrize("how", ["grace", "second signal"])
def test_an_answer_without_end_is_cut(long_model: Path, how: str) -> None:
    """When the grace is over, or at a second Ctrl-C: the client is told, and the status is 0 all the same."""
    grace = "0" if how == "grace" else "1000"
    with served(long_model, "--grace", grace, "--context", "65536") as (process, port, _):
        reply = begin(port, 65000, stream=True).getresponse()
        assert reply.status == 200
        process.send_signal(signal.SIGINT)
        if how == "second signal":
            assert begin(port, 1).getresponse().status == 503  # the first one was heeded
            process.send_signal(signal.SIGINT)
        last = reply.read().decode("utf-8").strip().split("\n\n")[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "stopping"
        process.communicate(timeout=PATIENCE)
    assert process.returncode == 0


def test_wrong_requests_are_one_line(refusal, llama_model: Path, tmp_path: Path) -> None:
    """Before the model is loaded, where that is possible."""
    cases = {
        "no such folder or file": ("nowhere",),
        "--api-key": (llama_model, "--host", "0.0.0.0"),
        "--port 99999": (llama_model, "--port", "99999"),
        "--queue -1": (llama_model, "--queue", "-1"),
        "--max-body": (llama_model, "--max-body", "much"),
        "--grace": (llama_model, "--grace", "-1"),
        "--idle-unload": (llama_model, "--idle-unload", "0"),
        "no index": (llama_model, "--port", 0, "--index", tmp_path / "nothing"),
        "the name 'a' is taken": (llama_model, "--adapter", "a=x", "--adapter", "a=y"),
        "kv 'f8'": (llama_model, "--port", 0, "--kv", "f8"),
        "speculation 'much'": (llama_model, "--port", 0, "--speculation", "much"),
    }
    for told, arguments in cases.items():
        assert told in refusal("serve", *arguments)


def test_a_missing_package_is_one_line(refusal, llama_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It names what installs it."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    told = "starlette is not installed; install it with: pip install 'quantlab[serve]'"
    assert refusal("serve", llama_model) == told


def test_the_native_path_loads_no_torch(llama_model: Path) -> None:
    """A server computes without torch and transformers."""
    code = (
        "import sys\nfrom quantlab.serving.server import make_service\n"
        "from quantlab.serving.settings import ModelSettings, ServerSettings\n"
        "make_service(ModelSettings(model=sys.argv[1], name='tiny', threads=1), ServerSettings())\n"
        "print([name for name in ('torch', 'transformers', 'sentence_transformers', 'lancedb') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(llama_model)], capture_output=True, text=True, timeout=PATIENCE, check=True
    )
    assert done.stdout == "[]\n"
