"""`/docs` in a chat: passages before each question, their sources behind each answer."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from light_embedder import LightEmbedder

import quantlab


@pytest.fixture(scope="module")
def model(make_model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), "llama", max_position_embeddings=1024)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("documents")
    (folder / "docs").mkdir()
    (folder / "docs" / "harbour.txt").write_text("The harbour of Velm freezes in March.")
    (folder / "docs" / "rye.md").write_text("# Rye\n\nRye bread takes sour dough.")
    quantlab.index_documents(folder / "docs", folder / "index", embedding_model=LightEmbedder())
    return folder / "index"


@pytest.fixture
def talk(run, model: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A function (lines on stdin, arguments) -> how the chat ended."""

    def talk(*lines: str, arguments: tuple[object, ...] = ()) -> Any:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(lines).encode())))
        return run("chat", model, "-n", 4, "-t", 1, *arguments)

    return talk


def asked(found: dict) -> list[str]:
    return [message["content"] for message in found["messages"] if message["role"] == "user"]


def test_passages_stand_before_questions_until_they_are_turned_off(talk, index):
    lines = ("Hi", f"/docs {index}", "What does rye bread take?", "/docs off", "And now?")
    first, second, third = asked(talk(*lines, arguments=("--json",)).json)
    assert (first, third) == ("Hi", "And now?")
    assert second.startswith("Answer from the numbered sources")
    assert "\n\n[1] # Rye\n\nRye bread takes sour dough.\n[2] The harbour" in second
    assert second.endswith("\n\nWhat does rye bread take?")


def test_sources_are_shown_behind_the_answer(talk, index):
    outcome = talk("When does the harbour of Velm freeze?", "/docs", arguments=("--index", index, "-k", 1))
    assert outcome.status == 0
    assert "\n[1] harbour.txt, line 1\n" in outcome.err
    assert f"[answers come from passages of {index}; /docs off ends that]" in outcome.err
    options = ("--index", index, "--search-method", "keyword")
    assert talk("rye", arguments=(*options, "--json")).json["sources"] == ["rye.md, lines 1 to 3"]
    assert "[no passage was found]" in talk("zebra", arguments=options).err


def test_undo_tells_the_question_and_retry_keeps_its_passages(talk, index):
    outcome = talk("What does rye take?", "/retry", "/undo", "/docs off", arguments=("--index", index))
    assert "[forgotten: What does rye take?]" in outcome.err
    assert "[answers come from the model alone; /docs DIR finds passages in an index]" in outcome.err
    (question,) = asked(talk("What does rye take?", "/retry", arguments=("--index", index, "--json")).json)
    assert question.count("[1] # Rye") == 1


def test_an_index_that_is_none_is_refused(talk, tmp_path):
    outcome = talk(f"/docs {tmp_path}")
    assert outcome.status == 2
    assert f"{tmp_path}: holds no index; make one" in outcome.err
    assert "holds no index" in talk("a", arguments=("--index", tmp_path)).err
