"""Task rows as templates ask them: types told by the answer, passages of every form, controls, and bad rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quantlab.errors import InputError
from quantlab.evaluation.asked_rows import AskedRow, RowAsking, asked_rows
from quantlab.evaluation.tasks import read_task
from quantlab.generation.examples import Example
from quantlab.generation.sources import GivenSource
from quantlab.generation.templates import TEMPLATES


def rows_of(folder: Path, *rows: object, rules: str = "strict") -> list[AskedRow]:
    path = folder / "task.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return asked_rows(path, read_task(path), rules)


def test_the_answer_tells_its_type(tmp_path: Path) -> None:
    found = rows_of(
        tmp_path,
        {"question": " Why? ", "answer": "2 + 2\n#### 1,234"},
        {"question": "b", "answer": "$12.50"},
        {"question": "c", "answer": 7.0},
        {"question": "d", "answer": "Yes"},
        {"question": "e", "answer": "The Mill."},
        {"question": "f", "answer": "green", "choices": ["red", "green"]},
        {"question": "g", "answer": "12", "type": "text"},
        {"question": "h", "answer": "no", "type": "yes/no"},
        {"question": "i", "answer": "All.  Of it", "type": "free"},
    )
    assert [(row.answer_type, row.reference) for row in found] == [
        ("number", "1234"),
        ("number", "12.5"),
        ("number", "7"),
        ("yes-no", "yes"),
        ("text", "the mill"),
        ("choice", "B"),
        ("text", "12"),
        ("yes-no", "no"),
        ("free", "all. of it"),
    ]
    assert found[0].question == "Why?"
    assert found[8].is_right("ALL. Of it.")
    assert not found[4].is_right("The Mill.")  # extractors spell answers alike


def test_references_by_the_papers_rules(tmp_path: Path) -> None:
    found = rows_of(
        tmp_path, {"question": "a", "answer": "x\n#### 1,234"}, {"question": "b", "answer": "No"}, rules="kojima"
    )
    assert [row.reference for row in found] == ["1,234", "no"]


def test_passages_of_every_form(tmp_path: Path) -> None:
    (row,) = rows_of(
        tmp_path,
        {
            "question": "a",
            "answer": 1,
            "passages": ["p", {"source": "s.md", "text": "q"}, {"text": "r"}],
            "context": "c",
        },
    )
    assert row.passages == (GivenSource("passages 1", "p"), GivenSource("s.md", "q"), GivenSource("passages 3", "r"))
    assert row.context == (GivenSource("context 1", "c"),)


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"prompt": "a", "answer": 1}, '"prompt" is continued as it is; templates need a "question"'),
        ({"question": "a", "answer": 1, "type": "date"}, "answer type 'date': choose one of: number, choice, yes-no, "),
        ({"question": "a", "answer": 1, "type": 1}, '"type" is no text'),
        ({"question": "a", "answer": 1, "type": "choice"}, '"type" choice goes with "choices", and no other does'),
        ({"question": "a", "answer": 0, "choices": ["x", "y"], "type": "text"}, '"type" choice goes with "choices"'),
        ({"question": "a", "answer": "five", "type": "number"}, '"answer" is no number, which its "type" says'),
        ({"question": "a", "answer": 1, "passages": [1]}, '"passages" holds something else than texts'),
        ({"question": "a", "answer": 1, "passages": [" "]}, '"passages" holds something else than texts'),
        ({"question": "a", "answer": 1, "context": {"source": "x"}}, '"context" holds something else than texts'),
        ({"question": "a", "answer": 0, "choices": ["x"] * 27}, "has 27 choices; there are letters for 26"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path: Path, row: object, fault: str) -> None:
    with pytest.raises(InputError) as caught:
        rows_of(tmp_path, {"question": "a", "answer": "b"}, row)
    assert f"task.jsonl: 1 bad rows: line 2: {fault}" in str(caught.value)


# What templates show around a row.

FOUR = [
    {"question": f"{name}?", "answer": answer, "passages": [f"{name}{number}" for number in range(4)], "context": name}
    for name, answer in (("a", 1), ("b", 1), ("c", 2), ("d", 3))
]


def passages(asking: RowAsking, number: int, template: str) -> list[str]:
    return [passage.text for passage in asking.asked(number, TEMPLATES[template]).passages]


def test_controls_show_other_passages(tmp_path: Path) -> None:
    """Its own, in another order, its context, and those of a question from half of the file on with another answer."""
    asking = RowAsking(rows_of(tmp_path, *FOUR), (), 0, "", None, seed=0)
    own = ["a0", "a1", "a2", "a3"]
    assert passages(asking, 0, "zero-shot") == []
    assert passages(asking, 0, "rag") == own
    orders = [
        passages(RowAsking(rows_of(tmp_path, *FOUR), (), 0, "", None, seed), 0, "rag-shuffled") for seed in range(9)
    ]
    assert all(sorted(order) == own for order in orders)
    assert len(set(map(tuple, orders))) > 2
    assert passages(asking, 0, "rag-shuffled") == orders[0]
    assert passages(asking, 0, "oracle") == ["a"]
    assert [passages(asking, number, "rag-other")[0] for number in range(4)] == ["c0", "d0", "a0", "b0"]
    three = RowAsking(rows_of(tmp_path, *FOUR[:2], FOUR[3]), (), 0, "", None, seed=0)
    assert passages(three, 0, "rag-other")[0] == "d0"  # b has the same answer


def test_a_search_stands_in_for_the_rows_own(tmp_path: Path) -> None:
    """And runs once a question."""
    asked: list[str] = []

    def search(question: str) -> list[GivenSource]:
        asked.append(question)
        return [GivenSource("found", f"of {question}")]

    asking = RowAsking(rows_of(tmp_path, *FOUR), (), 0, "", search, seed=0)
    assert passages(asking, 2, "rag") == passages(asking, 2, "rag-shuffled") == ["of c?"]
    assert passages(asking, 0, "rag-other") == ["of c?"]
    assert asked == ["c?", "a?"]


def test_an_example_that_is_the_question_is_not_shown(tmp_path: Path) -> None:
    examples = [Example(f"{name}?", "1") for name in "xayz"]
    asking = RowAsking(rows_of(tmp_path, *FOUR), examples, 3, "a clerk", None, seed=0)
    assert [example.question for example in asking.asked(0, TEMPLATES["few-shot"]).examples] == ["x?", "y?", "z?"]
    assert [example.question for example in asking.asked(1, TEMPLATES["few-shot"]).examples] == ["x?", "a?", "y?"]
    assert asking.asked(1, TEMPLATES["role"]).role == "a clerk"


def test_what_a_row_lacks(tmp_path: Path) -> None:
    bare = RowAsking(rows_of(tmp_path, {"question": "a", "answer": 1}), (), 0, "", None, seed=0)
    alike = RowAsking(rows_of(tmp_path, *(dict(row, passages=["p"]) for row in FOUR)), (), 0, "", None, seed=0)
    for asking, template, fault in (
        (bare, "rag", 'has no "passages"'),
        (bare, "oracle", 'has no "context"'),
        (alike, "rag-other", "no other question has passages that are all different"),
    ):
        with pytest.raises(InputError, match=fault):
            asking.asked(0, TEMPLATES[template])
