"""An index: what is found, what a second run does again, and what an interruption leaves."""

from __future__ import annotations

from pathlib import Path

import lancedb
import pytest
from tiny_embedder import DIMENSION, TinyEmbedder

import quantlab
from quantlab.errors import InputError
from quantlab.retrieval import indexing, store
from quantlab.retrieval.embedding import PROBE
from quantlab.retrieval.indexing import IndexReport
from quantlab.retrieval.store import open_store

FACTS = {
    "harbour.txt": "The harbour of Velm freezes in March. Its pilots wait.",
    "bread/rye.md": "# Rye\n\nRye bread takes sour dough and a slow oven.",
    "lamp.py": "def lamp():\n    return 'the lamp is lit'",
}


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    for name, text in FACTS.items():
        (tmp_path / "docs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "docs" / name).write_text(text, encoding="utf-8")
    return tmp_path / "docs"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "index"


def index(docs: Path, out: Path, embedder: TinyEmbedder | None = None, **options: object) -> IndexReport:
    return quantlab.index_documents(docs, out, embedding_model=embedder or TinyEmbedder(), **options)


def found(out: Path, query: str, method: str = "hybrid", k: int = 4) -> list[str]:
    return [p.source for p in quantlab.open_index(out, embedding_model=TinyEmbedder()).search(query, k, method=method)]


def done(report: IndexReport) -> tuple[int, int, int, int]:
    return report.documents, report.embedded, report.unchanged, report.deleted


def test_passages_are_found_by_either_ranking_and_by_both(docs, out):
    report = index(docs, out)
    assert (done(report), report.chunks, report.embedded_chunks) == ((3, 3, 0, 0), 3, 3)
    assert (report.embedding_model, report.dimension, report.chunk_tokens, report.overlap) == ("tiny", DIMENSION, 64, 8)
    opened = quantlab.open_index(out, embedding_model=TinyEmbedder())
    assert opened.complete
    for method in ("hybrid", "vector", "keyword"):
        passages = opened.search("slow oven for rye", 2, method=method)
        best = passages[0]
        assert (best.source, best.text, best.place, best.position) == (
            "bread/rye.md", "# Rye\n\nRye bread takes sour dough and a slow oven.", "lines 1 to 3", 0,
        )  # fmt: skip
        assert best.vector_rank == (None if method == "keyword" else 1)
        assert best.keyword_rank == (None if method == "vector" else 1)
        assert [each.score for each in passages] == sorted((each.score for each in passages), reverse=True)
    assert best.cited == "bread/rye.md, lines 1 to 3"


def test_scores_are_cosines_and_fused_ranks(docs, out):
    index(docs, out)
    opened = quantlab.open_index(out, embedding_model=TinyEmbedder())
    tiny = TinyEmbedder()
    query = "the lamp of the harbour"
    (best,) = opened.search(query, 1, method="vector")
    assert best.score == pytest.approx(float(tiny.query(query) @ tiny.query(best.text)), abs=1e-6)
    for passage in opened.search(query, 10**12):
        assert passage.score == pytest.approx(
            sum(1 / (60 + r) for r in (passage.vector_rank, passage.keyword_rank) if r)
        )


def test_equal_passages_come_by_source_and_position(out, tmp_path):
    for name in ("b.txt", "c.txt", "a.txt"):
        (tmp_path / "docs").mkdir(exist_ok=True)
        (tmp_path / "docs" / name).write_text("The same words.")
    index(tmp_path / "docs", out)
    for method in ("hybrid", "vector", "keyword"):
        assert found(out, "same words", method) == ["a.txt", "b.txt", "c.txt"]


def test_unchanged_documents_are_not_embedded_again(docs, out):
    index(docs, out)
    again = TinyEmbedder()
    report = index(docs, out, again)
    assert done(report) == (3, 0, 3, 0)
    assert again.texts == [PROBE]
    (docs / "harbour.txt").write_text("The harbour of Velm thaws in April.")
    (docs / "lamp.py").unlink()
    (docs / "new's.txt").write_text("Kestrels nest in the tower.")
    again = TinyEmbedder()
    report = index(docs, out, again)
    assert done(report) == (3, 2, 1, 1)
    assert sorted(text for text in again.texts if text != PROBE) == [
        "Kestrels nest in the tower.", "The harbour of Velm thaws in April.",
    ]  # fmt: skip
    assert found(out, "harbour March pilots freezes", "keyword") == ["harbour.txt"]
    assert "lamp.py" not in found(out, "lamp lit")
    (docs / "new's.txt").unlink()
    assert done(index(docs, out)) == (2, 0, 2, 1)
    assert found(out, "kestrels", "keyword") == []


def test_a_changed_document_loses_the_passages_that_it_had(docs, out):
    (docs / "harbour.txt").write_text("Pilots wait. " * 60)
    assert index(docs, out).chunks > 4
    (docs / "harbour.txt").write_text("Pilots left.")
    assert index(docs, out).chunks == 3


def test_an_interrupted_run_leaves_an_index_and_the_next_goes_on(docs, out, monkeypatch):
    """Documents are committed one by one here; the second is interrupted while it becomes vectors."""
    monkeypatch.setattr(indexing, "CHUNKS_A_COMMIT", 1)

    class Interrupted(TinyEmbedder):
        def documents(self, texts, done=None):
            if any("harbour" in text for text in texts):
                raise KeyboardInterrupt
            return super().documents(texts, done)

    with pytest.raises(KeyboardInterrupt):
        index(docs, out, Interrupted())
    notes: list[str] = []
    opened = quantlab.open_index(out, embedding_model=TinyEmbedder(), say=notes.append)
    assert [passage.source for passage in opened.search("rye")] == ["bread/rye.md"]
    assert "has not finished" in notes[0]
    report = index(docs, out)
    assert done(report) == (3, 2, 1, 0)
    assert opened.complete  # an open index sees what is new
    assert len(opened.search("rye harbour lamp")) == 3


class Killed(BaseException):
    """The process ends here."""


def test_killed_between_any_two_steps(docs, out, monkeypatch):
    """What is there can be searched, or is no index yet; the next run makes it whole, its index of words too."""
    monkeypatch.setattr(indexing, "CHUNKS_A_COMMIT", 1)
    step = store._told
    last, whole = 0, False
    while not whole:
        last, steps, place = last + 1, 0, out / str(last)

        def told(uri, action, last=last):
            nonlocal steps
            steps += 1
            if steps == last:
                raise Killed
            return step(uri, action)

        with monkeypatch.context() as patch:
            patch.setattr(store, "_told", told)
            try:
                index(docs, place)
                whole = True
            except Killed:
                pass
        if open_store(str(place)) is not None:
            for method in ("hybrid", "vector", "keyword"):
                assert len(found(place, "velm rye lamp", method)) <= 3
        assert done(index(docs, place))[0] == 3
        assert sorted(found(place, "velm rye lamp", "keyword")) == sorted(FACTS)
        assert quantlab.open_index(place).complete
        assert lancedb.connect(place).open_table("chunks").list_indices()
    assert last > 10


def test_progress_comes_to_its_end(docs, out):
    seen: list[tuple[int, int, str]] = []
    index(docs, out, progress=lambda *report: seen.append(report))
    size = sum(len(text.encode()) for text in FACTS.values())
    assert seen[-1] == (size, size, "3 of 3 documents, 3 chunks")
    assert [each[0] for each in seen] == sorted(each[0] for each in seen)


def test_what_holds_no_text_is_skipped_and_told(docs, out):
    (docs / "empty.txt").touch()
    (docs / "binary.txt").write_bytes(b"\0\1\2")
    report = index(docs, out)
    assert [(each.source, each.reason) for each in report.skipped] == [
        ("binary.txt", "holds zero bytes: binary data, not text"), ("empty.txt", "holds no text; the file is empty"),
    ]  # fmt: skip
    assert report.documents == 3
    (docs / "harbour.txt").write_bytes(b"\0")
    assert done(index(docs, out)) == (2, 0, 2, 1)


def test_documents_without_any_text_are_refused_and_leave_nothing(out, tmp_path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(InputError, match=r"none of the 1 documents holds text.*empty\.txt: holds no text"):
        index(tmp_path / "empty.txt", out)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.png").touch()
    with pytest.raises(InputError, match=r"holds no document .*1 \.png"):
        index(tmp_path / "docs", out)
    assert not out.exists()


def test_another_embedding_model_is_refused_until_rebuild(docs, out):
    """Its name may be another if its vectors are the same."""
    index(docs, out)
    other = TinyEmbedder("other", salt="other")
    with pytest.raises(InputError, match=r"another embedding model \(tiny, 256 dimensions\) than other.*--rebuild"):
        index(docs, out, other)
    with pytest.raises(InputError, match="another embedding model"):
        quantlab.open_index(out, embedding_model=other).search("rye")
    assert done(index(docs, out, TinyEmbedder("moved"))) == (3, 0, 3, 0)
    report = index(docs, out, other, rebuild=True)
    assert (done(report), report.embedding_model) == ((3, 3, 0, 0), "other")
    opened = quantlab.open_index(out, embedding_model=other)
    assert opened.complete
    assert opened.search("rye", 1)[0].source == "bread/rye.md"


def test_other_chunk_sizes_are_refused_until_rebuild(docs, out):
    index(docs, out, chunk_tokens=32, overlap=4)
    for options in ({"chunk_tokens": 16}, {"overlap": 3}):
        with pytest.raises(InputError, match="--rebuild"):
            index(docs, out, **options)
    assert index(docs, out, chunk_tokens=32).unchanged == 3
    assert index(docs, out).chunk_tokens == 32
    assert index(docs, out, chunk_tokens=16, rebuild=True).overlap == 2


def test_other_documents_do_not_take_an_index_over(docs, out, tmp_path):
    index(docs, out)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.txt").write_text("Other words.")
    with pytest.raises(InputError, match=r"holds 3 documents, none of which is in .*other"):
        index(tmp_path / "other", out)
    assert done(index(tmp_path / "other", out, rebuild=True)) == (1, 1, 0, 0)


def test_the_index_may_lie_among_the_documents(docs):
    assert index(docs, docs / "index").documents == 3
    assert done(index(docs, docs / "index")) == (3, 0, 3, 0)


def test_other_files_are_no_index(docs, out):
    with pytest.raises(InputError, match="holds other files and no index"):
        index(docs, docs)
    with pytest.raises(InputError, match="is no folder"):
        index(docs, docs / "lamp.py")
    with pytest.raises(InputError, match="holds no index; make one"):
        quantlab.open_index(docs)
    with pytest.raises(InputError, match="holds no index; make one"):
        quantlab.open_index(out)


def test_a_damaged_index_is_refused_and_made_anew(docs, out):
    index(docs, out)
    for version in (out / "chunks.lance" / "_versions").iterdir():
        version.write_bytes(b"no version")
    with pytest.raises(InputError, match=r"cannot be used: .*--rebuild") as caught:
        quantlab.open_index(out)
    assert ".rs" not in str(caught.value)
    with pytest.raises(InputError, match="--rebuild"):
        index(docs, out)
    assert index(docs, out, rebuild=True).documents == 3


def test_one_process_at_a_time(docs, out):
    from quantlab.checkpoint.unfinished import locked

    index(docs, out)
    with locked(out), pytest.raises(InputError, match="another process is at work"):
        index(docs, out)


@pytest.mark.parametrize(
    "query", ['"', "a AND (b", "lamp* -rye title:x ~", "??!", "the of", "x " * 5_000, "\u732b", "\n lamp"]
)
def test_no_query_is_too_strange(docs, out, query):
    index(docs, out)
    for method in ("hybrid", "vector", "keyword"):
        assert len(found(out, query, method)) <= 3


@pytest.mark.parametrize(
    ("query", "options", "reason"),
    [("", {}, "query is empty"), (" \n", {}, "query is empty"), ("\udcff", {}, "not UTF-8"),
     ("a", {"k": 0}, "0 passages"), ("a", {"method": "magic"}, "choose one of: hybrid, vector, keyword")],
)  # fmt: skip
def test_queries_that_ask_nothing_are_refused(docs, out, query, options, reason):
    index(docs, out)
    with pytest.raises(InputError, match=reason):
        quantlab.open_index(out, embedding_model=TinyEmbedder()).search(query, **options)


def test_keywords_need_no_embedding_model(docs, out):
    index(docs, out)
    opened = quantlab.open_index(out, embedding_model="/no/such/model")
    assert [passage.source for passage in opened.search("lamp", method="keyword")] == ["lamp.py"]
    with pytest.raises(InputError, match="no such"):
        opened.search("lamp")


def test_the_store_at_a_uri(docs, tmp_path):
    """What LanceDB takes beside a folder's name."""
    uri = f"file://{tmp_path}/index"
    assert index(docs, uri).documents == 3
    assert done(index(docs, uri)) == (3, 0, 3, 0)
    store = open_store(uri)
    assert store is not None
    assert sorted(store.documents()) == sorted(FACTS)
