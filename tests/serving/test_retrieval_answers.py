"""A chat with passages of an index: what the model reads, and what the client is told of it."""

from __future__ import annotations

import pytest
from word_embedder import WordEmbedder

from quantlab.retrieval.index import open_index
from quantlab.retrieval.indexing import index_documents
from quantlab.serving.documents import Documents
from quantlab.serving.settings import ModelSettings, ServerSettings


@pytest.fixture(scope="module")
def informed(start, make_model, tmp_path_factory: pytest.TempPathFactory):
    """A server with an index of two documents."""
    folder = tmp_path_factory.mktemp("documents")
    (folder / "docs").mkdir()
    (folder / "docs" / "harbour.txt").write_text("The harbour of Velm freezes in March.", encoding="utf-8")
    (folder / "docs" / "rye.txt").write_text("Rye bread takes sour dough.", encoding="utf-8")
    index_documents(folder / "docs", folder / "index", embedding_model=WordEmbedder())
    model = make_model(folder / "model", "llama", max_position_embeddings=1024)
    documents = Documents(open_index(folder / "index", embedding_model=WordEmbedder()), 2, "hybrid")
    settings = ServerSettings(port=0, log_texts=True)
    with start(ModelSettings(model=str(model), name="tiny", threads=1), settings, documents=documents) as running:
        yield running


def test_passages_stand_before_the_question(informed) -> None:
    """The best first; with the answer come their sources. The log tells texts only because it was told to."""
    before = len(informed.log)
    reply = informed.client.chat("What does rye bread take?", retrieval=True).json
    first, second = reply["sources"]
    assert (first["number"], first["source"], first["text"]) == (1, "rye.txt, line 1", "Rye bread takes sour dough.")
    assert second["number"] == 2
    assert second["source"].startswith("harbour.txt")
    assert first["score"] > second["score"]
    line = informed.last_line(before + 1)
    read = line["messages"][-1]["content"]
    assert read.startswith("Answer from the numbered sources")
    assert "[1] Rye bread takes sour dough.\n[2] The harbour of Velm" in read
    assert read.endswith("\n\nWhat does rye bread take?")
    assert line["answers"] == [reply["choices"][0]["message"]["content"]]


def test_a_stream_tells_its_sources_first(informed) -> None:
    """Fewer, if the request wants fewer."""
    asked = {"retrieval": {"passages": 1, "method": "keyword"}, "stream": True}
    events = informed.client.chat("When does the harbour of Velm freeze?", **asked).events
    assert [source["source"] for source in events[0]["sources"]] == ["harbour.txt, line 1"]
    assert not [event for event in events[1:] if "sources" in event]


def test_without_the_field_the_model_answers_alone(informed) -> None:
    """As where it is false."""
    for fields in ({}, {"retrieval": False}, {"retrieval": None}):
        reply = informed.client.chat("What does rye bread take?", **fields).json
        assert "sources" not in reply
    assert informed.client.get("/v1/models").json["data"][0]["has_index"] is True


def test_what_cannot_be_searched_is_refused(informed, running) -> None:
    """No question, a wrong number, no index."""
    wrong = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    wrong += [{"messages": [{"role": "user", "content": " "}]}, {"retrieval": {"passages": 0}}, {"retrieval": 5}]
    for fields in wrong:
        assert informed.client.chat(**{"retrieval": True, **fields}).status == 400
    assert "--index" in running.client.chat(retrieval=True).error["message"]


def test_texts_are_not_told_by_default(running) -> None:
    """The log of a server that was not asked to."""
    running.client.chat("a secret")
    running.client.post("/v1/completions", {"prompt": "a secret", "max_tokens": 1})
    assert "secret" not in str(running.log)
