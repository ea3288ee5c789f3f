"""`compare`, `perplexity`, `report` and `evaluate` as they are typed."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import quantlab
from quantlab.documents import read_documents
from quantlab.evaluation.evaluate import evaluate

Run = Callable[..., Any]
CONTEXT = ("--context", 64)


@pytest.fixture(scope="module")
def text(prose: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two short documents."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n<|endoftext|>\n".join(document[:600] for document in read_documents(prose)[:2]))
    return path


@pytest.fixture(scope="module")
def q4_0(llama_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama's Q4_0."""
    folder = tmp_path_factory.mktemp("model") / "q4_0"
    quantlab.quantize_checkpoint(llama_model, folder, format="q4_0")
    return folder


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One question of each kind, twice."""
    path = tmp_path_factory.mktemp("task") / "task.jsonl"
    rows = [{"question": "a", "choices": ["b", "c"], "answer": "A"}, {"question": "a", "answer": "#### 3"}]
    path.write_text("\n".join(map(json.dumps, rows * 2)))
    return path


def plain(result: object) -> Any:
    """What --json makes of a result: lists and numbers."""
    return json.loads(json.dumps(dataclasses.asdict(result)))


def test_options_reach_the_library(run: Run, llama_model: Path, q4_0: Path, text: Path) -> None:
    """Each of compare's and perplexity's changes the figures as the library's argument does."""
    typed = {"stride": 16, "activations_b": "int8", "kv_a": "f16", "worst": 2}
    flags = [part for name, value in typed.items() for part in (f"--{name.replace('_', '-')}", value)]
    found = run("compare", llama_model, q4_0, text, *CONTEXT, *flags, "--json").json
    assert found == plain(quantlab.compare(llama_model, q4_0, text, context=64, **typed))
    found = run("compare", llama_model, q4_0, text, *CONTEXT, "--activations", "int8", "--kv-b", "f32", "--json").json
    assert (found["activations_a"], found["kv_a"], found["kv_b"]) == ("int8", "f16", "f32")
    found = run("compare", llama_model, q4_0, text, *CONTEXT, "--windows", "llama", "--engine", "torch", "--json").json
    assert (found["tokens"], found["engine"]) == (31 * found["windows"], "torch")
    found = run("perplexity", q4_0, text, *CONTEXT, "--windows", "llama", "--activations", "int8", "--json").json
    twin = quantlab.perplexity(q4_0, text, context=64, windows="llama", activations="int8")
    assert found == plain(twin)
    assert (found["kv"], found["windows"] * 31) == ("f16", found["tokens"])


def test_the_table_of_compare(run: Run, llama_model: Path, q4_0: Path, text: Path) -> None:
    """Figures with their errors, a row for each document, the worst tokens in brackets."""
    result = quantlab.compare(llama_model, q4_0, text, context=64, worst=3)
    out = run("compare", llama_model, q4_0, text, *CONTEXT, "--worst", 3).out
    for number in (result.kld_mean, result.kld_stderr, result.kld_p999, result.ln_ratio, result.perplexity_ratio):
        assert f"{number:.6f}" in out
    for document in result.documents:
        assert f"{document.document} {document.begins}" in out
    assert out.count("[") == 3
    assert "A: native engine, f32 activations, f32 cache" in out


def test_reports(run: Run, refusal: Run, llama_model: Path, q4_0: Path, text: Path, tmp_path: Path) -> None:
    """A page beside compare's figures; a report of several files; a place that is taken."""
    page = tmp_path / "one.html"
    found = run("compare", llama_model, q4_0, text, *CONTEXT, "--report", page, "--json").json
    assert found == plain(quantlab.compare(llama_model, q4_0, text, context=64))
    assert f"{found['kld_mean']:.6f}" in page.read_text()
    folder = tmp_path / "pictures"
    files = (llama_model, q4_0)
    found = run("report", llama_model, *files, "--text", text, "--out", folder, *CONTEXT, "--json").json
    assert [file["file"] for file in found["files"]] == list(map(str, files))
    assert [file["kld_mean"] > 0 for file in found["files"]] == [False, True]
    assert sorted(file.name for file in folder.iterdir()) == ["divergence.png", "size.png", "tensors.png"]
    out = run("report", llama_model, q4_0, "--text", text, "--out", page, *CONTEXT).out
    assert f"{found['files'][1]['kld_mean']:.6f}" in out
    (tmp_path / "mine.html").write_text("mine")
    line = refusal("compare", llama_model, q4_0, text, *CONTEXT, "--report", tmp_path / "mine.html")
    assert line.startswith(f"{tmp_path / 'mine.html'}: exists and is no report")


def test_evaluate(run: Run, refusal: Run, llama_model: Path, task: Path, tmp_path: Path) -> None:
    """--json is the library's result; people see both kinds of question; bad rows end with status 2."""
    found = run("evaluate", llama_model, "--task", task, "--limit", 3, "--max-tokens", 8, "--json").json
    assert found == plain(evaluate(llama_model, task, limit=3, max_tokens=8))
    assert {"accuracy", "stderr", "n", "per_template"} <= set(found)
    assert found["n"] == 3
    assert set(found["per_template"]) == {"plain"}
    out = run("evaluate", llama_model, "--task", task, "--max-tokens", 8).out
    assert all(word in out for word in ("exact answers", "choices, by likelihood per byte", "95 % interval"))
    (tmp_path / "bad.jsonl").write_text('{"question": "a", "answer": 1}\n{"question": "a"}\n')
    line = refusal("evaluate", llama_model, "--task", tmp_path / "bad.jsonl")
    assert line == f'{tmp_path / "bad.jsonl"}: 1 bad rows: line 2: "answer" is missing'


NO_TORCH = """
import sys
sys.argv = ["quantlab", *sys.argv[1:]]
import quantlab.cli
status = quantlab.cli._run()
print(status, "torch" in sys.modules, "transformers" in sys.modules)
"""


@pytest.mark.parametrize("command", ["compare", "perplexity", "evaluate"])
def test_measuring_loads_no_torch(llama_model: Path, q4_0: Path, text: Path, task: Path, command: str) -> None:
    """On the native engine."""
    arguments = {
        "compare": (llama_model, q4_0, text, *CONTEXT),
        "perplexity": (q4_0, text, *CONTEXT),
        "evaluate": (q4_0, "--task", task, "-n", 4),
    }
    done = subprocess.run(
        [sys.executable, "-c", NO_TORCH, command, *map(str, arguments[command])],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "0 False False"
