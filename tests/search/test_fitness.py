"""Fitness: sums of terms against what the parts say, functions, and files that must not overlap."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from evolve_cases import write_texts

from quantlab.errors import InputError
from quantlab.evaluation.evaluate import evaluate
from quantlab.evaluation.perplexity import perplexity
from quantlab.search.fitness import Fitness, Term, check_disjoint, digest_of


@pytest.fixture
def texts(prose, tmp_path) -> tuple[Path, Path]:
    return write_texts(prose, tmp_path)


def task(file: Path, *questions: str) -> Path:
    rows = [{"question": question, "answer": "a", "choices": ["a", "b"]} for question in questions]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def test_a_weighted_sum_of_terms(llama_model, texts, tmp_path):
    questions = task(tmp_path / "task.jsonl", "Who?", "When?", "Where?", "Why?")
    terms = (
        Term("loss", str(texts[0]), 0.5, context=32),
        Term("task", str(questions), 2.0, limit=3),
        Term("loss", str(texts[0]), 0.25, context=16),
    )
    found = Fitness(terms).score(llama_model)
    losses = [perplexity(llama_model, texts[0], context=context) for context in (32, 16)]
    accuracy = evaluate(llama_model, questions, limit=3)
    assert found.terms == {
        "loss fitness.txt": -losses[0].nll,
        "task task.jsonl": accuracy.accuracy,
        "loss fitness.txt #2": -losses[1].nll,
    }
    assert found.score == pytest.approx(-0.5 * losses[0].nll + 2 * accuracy.accuracy - 0.25 * losses[1].nll, rel=1e-12)
    errors = 0.5 * losses[0].stderr, 2 * accuracy.stderr, 0.25 * losses[1].stderr
    assert found.stderr == pytest.approx(math.hypot(*errors), rel=1e-12)


def test_functions_have_no_standard_error(texts, llama_model):
    terms = (Term("call", "a:b", 3.0, function=lambda model: len(model.name)), Term("loss", str(texts[0]), context=32))
    found = Fitness(terms).score(llama_model)
    assert found.stderr is None
    assert found.terms["call a:b"] == len(llama_model.name)


def test_functions_named_by_text(tmp_path, monkeypatch):
    (tmp_path / "scoring.py").write_text("def size(model):\n    return model.stat().st_size\nword = 'no function'\n")
    (tmp_path / "file").write_bytes(b"123")
    by_file = f"{tmp_path / 'scoring.py'}:size"
    with pytest.raises(InputError, match="runs code; allow it with --trust-code"):
        Fitness([Term("call", by_file)])
    assert Fitness([Term("call", by_file)], trust_code=True).score(tmp_path / "file").score == 3
    monkeypatch.syspath_prepend(tmp_path)
    assert Fitness([Term("call", "scoring:size")], trust_code=True).score(tmp_path / "file").score == 3
    for source, reason in (
        ("scoring:absent", "scoring has no function 'absent'"),
        ("scoring:word", "scoring has no function 'word'"),
        ("no_such_module:size", "cannot be imported"),
        (f"{tmp_path / 'absent.py'}:size", "cannot be imported"),
    ):
        with pytest.raises(InputError, match=reason):
            Fitness([Term("call", source)], trust_code=True)


@pytest.mark.parametrize("value", ["much", None, float("nan")])
def test_what_is_no_score(value, tmp_path):
    with pytest.raises(InputError, match=r"a:b( gives nan|: gives .* instead of a number)"):
        Fitness([Term("call", "a:b", function=lambda model: value)]).score(tmp_path)


def test_files_that_overlap_are_refused(texts, tmp_path):
    fitness, test = (Term("loss", str(text)) for text in texts)
    check_disjoint([fitness], [test])
    with pytest.raises(InputError, match=r"6 of its rows are in .*fitness.txt too|7 of its rows"):
        check_disjoint([fitness], [fitness])
    line = texts[0].read_text().splitlines()[2]
    texts[1].write_text(f"{texts[1].read_text()}\n  {line.replace(' ', '   ')}\n}}\n")
    with pytest.raises(InputError) as refused:
        check_disjoint([fitness], [test])
    assert f"{texts[1]}: 1 of its rows are in {texts[0]} too, the first is '{line[:20]}" in str(refused.value)
    one, other = task(tmp_path / "one.jsonl", "Who?", "When?"), task(tmp_path / "other.jsonl", "Why?", "When?")
    with pytest.raises(InputError, match=r"other.jsonl: 1 of its rows"):
        check_disjoint([Term("task", str(one))], [test, Term("task", str(other))])
    check_disjoint([Term("task", str(one), limit=1)], [Term("task", str(other))])


def test_the_digest_is_of_contents(texts, tmp_path):
    """Another place of the same text is the same; another text, window or weight is not."""
    moved = tmp_path / "moved.txt"
    moved.write_bytes(texts[0].read_bytes())
    digest = digest_of([Term("loss", str(texts[0]))])
    assert digest_of([Term("loss", str(moved))]) == digest
    others = [Term("loss", str(texts[1])), Term("loss", str(moved), 2.0), Term("loss", str(moved), context=64)]
    assert len({digest, *(digest_of([term]) for term in others)}) == 4


def test_missing_files_show_at_once(tmp_path):
    with pytest.raises(InputError, match=r"absent.txt: cannot be read"):
        Fitness([Term("loss", str(tmp_path / "absent.txt"))])
    with pytest.raises(InputError, match="nothing to score by"):
        Fitness([])
