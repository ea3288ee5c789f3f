"""Passages of an index in prompts: `generate --index`, and `evaluate --index` with its recall."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from light_embedder import LightEmbedder

import quantlab
from quantlab.checkpoint import load_tokenizer

DOCUMENTS = {
    "town/harbour.txt": "The harbour of Velm freezes in March.",
    "rye.md": "# Rye\n\nRye bread takes sour dough.",
    "lamp.txt": "The lamp is in the tower.",
}
ROWS = [
    {"question": "When does the harbour of Velm freeze?", "answer": "March", "source": "harbour.txt"},
    {"question": "What does rye bread take?", "answer": "sour dough", "source": ["rye.md", "none.md"]},
    {"question": "Where is the lamp?", "answer": "tower", "source": "other.txt"},
    {"question": "Who is there?", "answer": "nobody"},
]


@pytest.fixture(scope="module")
def model(make_model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), "llama", max_position_embeddings=512)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("documents")
    for name, text in DOCUMENTS.items():
        (folder / "docs" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "docs" / name).write_text(text)
    quantlab.index_documents(folder / "docs", folder / "index", embedding_model=LightEmbedder())
    return folder / "index"


@pytest.fixture
def task(tmp_path: Path) -> Path:
    path = tmp_path / "task.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return path


def test_generate_shows_the_sources_of_its_passages(run, model, index):
    asked = ("generate", model, "-p", "What does rye bread take?", "--template", "rag", "--index", index, "-n", 4)
    found = run(*asked, "-k", 2, "--json").json
    assert found["sources"][0] == "rye.md, lines 1 to 3"
    assert len(found["sources"]) == 2
    prompt = found["steps"][0]["prompt"]
    assert "[1] # Rye\n\nRye bread takes sour dough.\n[2] " in prompt
    assert prompt.index("Answer from the numbered sources") < prompt.index("[1]") < prompt.index("What does rye bread")
    assert "\n[1] rye.md, lines 1 to 3\n[2] " in run(*asked, "-k", 2).out
    assert len(run(*asked, "-k", 2, "--search-method", "keyword", "--json").json["sources"]) == 1


def test_what_all_prompts_begin_with_is_computed_once(run, model, index, tmp_path):
    """The instructions stand before the passages, so another process has their cache, whatever it asks."""
    asked = ("generate", model, "--template", "rag", "--index", index, "-n", 1, "--prompt-cache", tmp_path / "cache")
    first = run(*asked, "-p", "What does rye bread take?", "--json").json
    second = run(*asked, "-p", "Where is the lamp?", "--json").json
    prompts = [found["steps"][0]["prompt"] for found in (first, second)]
    assert len({prompt.partition("[1] ")[0] for prompt in prompts}) == 1
    ids = [load_tokenizer(model).encode(prompt) for prompt in prompts]
    common = next(number for number, (one, other) in enumerate(zip(*ids, strict=False)) if one != other)
    assert first["timings"]["cached_tokens"] == 0
    assert second["timings"]["cached_tokens"] == common > 50


def test_recall_is_told_apart_from_accuracy(run, model, index, task):
    """Three rows name their sources; of those that are found, accuracy is told once more; controls are not."""
    options = (
        "--template",
        "rag",
        "--template",
        "rag-shuffled",
        "--template",
        "closed-book",
        "--index",
        index,
        "-k",
        1,
    )
    asked = ("evaluate", model, "--task", task, *options, "-n", 4)
    recall = run(*asked, "--json").json["recall"]
    assert recall["passages"] == 1
    assert (recall["found"]["n"], recall["found"]["accuracy"]) == (3, pytest.approx(2 / 3))
    assert list(recall["accuracy_if_found"]) == ["rag"]
    assert (recall["accuracy_if_found"]["rag"]["n"], recall["accuracy_if_found"]["rag"]["accuracy"]) == (2, 0.0)
    out = run(*asked).out
    assert "source found among 1" in out
    assert "66.7 %" in out
    assert "rag: right where it was found" in out


def test_searching_shows_progress(run, model, index, task, monkeypatch):
    """All questions are searched for before the first is asked."""
    monkeypatch.setattr("quantlab.cli.console.LINE_SECONDS", 0)
    err = run("evaluate", model, "--task", task, "--template", "rag", "--index", index, "-k", 1, "-n", 2).err
    lines = [line for line in err.splitlines() if line.startswith("evaluating: 0/4, ")]
    assert [line.rpartition("  ")[2] for line in lines] == [f"{n} of 4 questions prepared" for n in range(1, 5)]
    assert err.index("4 of 4 questions prepared") < err.index("evaluating: 1/4, ")


def test_there_is_no_recall_without_sources_or_passages(run, model, index, task, tmp_path):
    bare = tmp_path / "bare.jsonl"
    bare.write_text(json.dumps(ROWS[3]))
    for arguments in (("--task", bare, "--template", "rag", "--index", index), ("--task", task, "--template", "cot")):
        assert run("evaluate", model, *arguments, "-n", 4, "--limit", 1, "--json").json["recall"] is None


def test_wrong_requests(refusal, model, index, task, tmp_path):
    for arguments, fault in (
        (("-p", "a", "--index", index), "--index: means nothing without a --template"),
        (("-p", "a", "--template", "rag"), "template rag: shows passages; give an index with --index, or files"),
        (("-p", "a", "--template", "cot", "--index", index), "--index: template cot shows none; add +rag"),
        (("-p", "a", "--template", "rag", "--index", tmp_path), f"{tmp_path}: holds no index; make one"),
        (("-p", "a", "--template", "rag", "--index", index, "-k", 0), "0 passages: at least 1 is needed"),
        (("-p", " ", "--template", "rag", "--index", index), "the query is empty"),
        (("-p", "a", "--template", "rag", "--index", index, "--search-method", "x"), "search method x: choose one of"),
        (("-p", "a", "--template", "rag", "--index", index, "--passages", task), "--index: passages come from files"),
    ):
        assert refusal("generate", model, *arguments).startswith(fault)
    evaluate = ("evaluate", model, "--task", task, "--index", index)
    assert refusal(*evaluate) == "--index: means nothing without a --template"
    assert "none of the templates shows passages" in refusal(*evaluate, "--template", "cot")
    (tmp_path / "bad.jsonl").write_text(json.dumps({**ROWS[0], "source": [1]}))
    fault = refusal("evaluate", model, "--task", tmp_path / "bad.jsonl", "--template", "rag", "--index", index)
    assert '"source" is no name of a document' in fault
