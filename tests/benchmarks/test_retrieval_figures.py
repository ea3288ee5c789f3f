"""The benchmark of retrieval: a fact counts as found where its own document is among the passages."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    return importlib.import_module("retrieval")


class Answering:
    """An index whose passages are told by the question."""

    def __init__(self, found: dict[str, list[str]]) -> None:
        self._found = found

    def search(self, query: str, k: int, *, method: str) -> list[SimpleNamespace]:
        return [SimpleNamespace(source=source) for source in self._found[query][:k]]


def test_recall_counts_the_facts_own_documents(benchmark, tmp_path):
    facts = benchmark.base_facts()[:4]
    benchmark.write_base(facts, tmp_path)
    own = [benchmark.passage_of(fact).source for fact in facts]
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(own)
    ranked = [[own[0]], [own[0], own[1]], [own[3], own[0], own[1]], []]
    answers = Answering({fact.question: sources for fact, sources in zip(facts, ranked, strict=True)})
    found = benchmark.measured(answers, facts, "hybrid")
    assert (found.first.accuracy, found.among.accuracy, found.among.n) == (0.25, 0.5, 4)


def test_every_fact_of_the_base_has_a_document_and_a_question_of_its_own(benchmark):
    facts = benchmark.base_facts()
    assert len(facts) == 2080
    assert len({benchmark.passage_of(fact).source for fact in facts}) == 2080
    assert len({fact.question for fact in facts}) == 2080
