"""Task files: what rows mean, which are wrong, and when a generated text is right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quantlab.errors import InputError
from quantlab.evaluation.tasks import Question, is_right, last_number, normalized, read_task

GSM8K = "He buys 2 + 3 = <<2+3=5>>5 apples.\nThey cost 1,234 in all.\n#### 1,234"


def task_file(folder: Path, *rows: object) -> Path:
    path = folder / "task.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_rows_of_every_kind(tmp_path: Path) -> None:
    """A question gets the plain prompt, a prompt stays as it is; a right choice is a number, a letter or a text."""
    choices = ["red", "green", "B"]
    path = task_file(
        tmp_path,
        {"question": " What is 2 + 2? ", "answer": 4},
        "",
        {"prompt": "Two and two make ", "answer": "four"},
        {"question": "Q", "answer": GSM8K},
        {"question": "Q", "choices": choices, "answer": 1},
        {"question": "Q", "choices": choices, "answer": "c"},
        {"question": "Q", "choices": choices, "answer": "B"},  # a letter comes before a text
        {"prompt": "Q", "choices": choices, "answer": "red"},
    )
    asked = "Question: Q\nAnswer:"
    assert read_task(path) == [
        Question(1, "Question: What is 2 + 2?\nAnswer:", "4"),
        Question(3, "Two and two make ", "four"),
        Question(4, asked, GSM8K),
        Question(5, asked, 1, ("red", "green", "B")),
        Question(6, asked, 2, ("red", "green", "B")),
        Question(7, asked, 1, ("red", "green", "B")),
        Question(8, "Q", 0, ("red", "green", "B")),
    ]


def test_line_breaks_of_other_alphabets_part_no_rows(tmp_path: Path) -> None:
    """JSON may hold U+2028 and U+0085 as they are; only the line feed parts rows."""
    path = task_file(tmp_path, '{"prompt": "one\u2028two\x85three", "answer": "x"}')
    assert read_task(path) == [Question(1, "one\u2028two\x85three", "x")]


def test_a_limit_takes_the_first_or_draws(tmp_path: Path) -> None:
    """With a seed at random, in the file's order, the same for the same seed."""
    path = task_file(tmp_path, *({"question": f"{number}?", "answer": number} for number in range(50)))
    assert [q.line for q in read_task(path, 3)] == [1, 2, 3]
    drawn = [q.line for q in read_task(path, 10, seed=1)]
    assert drawn == sorted(set(drawn)) == [q.line for q in read_task(path, 10, seed=1)]
    assert drawn != [q.line for q in read_task(path, 10, seed=2)]
    assert len(drawn) == 10
    assert len(read_task(path, 500, seed=1)) == len(read_task(path, 50)) == 50
    with pytest.raises(InputError, match="limit 0: at least 1 is needed"):
        read_task(path, 0)


BAD = [
    ("{", "is no JSON"),
    ("[1]", "is no JSON object"),
    ({"answer": 1}, 'needs either "question" or "prompt"'),
    ({"question": "a", "prompt": "b", "answer": 1}, 'needs either "question" or "prompt"'),
    ({"question": " ", "answer": 1}, '"question" is no text'),
    ({"prompt": 7, "answer": 1}, '"prompt" is no text'),
    ({"question": "a"}, '"answer" is missing'),
    ({"question": "a", "answer": True}, '"answer" is neither text nor number'),
    ({"question": "a", "answer": None}, '"answer" is neither text nor number'),
    ({"question": "a", "answer": " . "}, '"answer" is empty'),
    ({"question": "a", "answer": "so\n#### none"}, '"answer" has no number behind ####'),
    ({"question": "a", "choices": ["x"], "answer": 0}, '"choices" is no list of two texts or more'),
    ({"question": "a", "choices": ["x", ""], "answer": 0}, '"choices" is no list of two texts or more'),
    ({"question": "a", "choices": ["x", "y"], "answer": 2}, '"answer" is 2; with 2 choices, 0 to 1 are possible'),
    ({"question": "a", "choices": ["x", "y"], "answer": -1}, '"answer" is -1; with 2 choices, 0 to 1 are possible'),
    ({"question": "a", "choices": ["x", "y"], "answer": "C"}, '"answer" is neither number, letter nor text of one'),
    ({"question": "a", "choices": ["x", "y"], "answer": 0.5}, '"answer" is neither number, letter nor text of one'),
]


@pytest.mark.parametrize(("row", "fault"), BAD)
def test_a_bad_row_is_named_by_its_line(tmp_path: Path, row: object, fault: str) -> None:
    path = task_file(tmp_path, {"question": "a", "answer": "b"}, "", row)
    with pytest.raises(InputError) as caught:
        read_task(path)
    assert str(caught.value).startswith(f"{path}: 1 bad rows: line 3: {fault}")


def test_all_bad_rows_are_counted_and_ten_are_listed(tmp_path: Path) -> None:
    path = task_file(tmp_path, *["nonsense"] * 12)
    with pytest.raises(InputError) as caught:
        read_task(path)
    assert str(caught.value).startswith(f"{path}: 12 bad rows: line 1: is no JSON; line 2: ")
    assert str(caught.value).endswith("line 10: is no JSON; and 2 more")


def test_files_that_are_no_tasks(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text(" \n\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\0")
    for name, fault in (("none", "cannot be read"), ("empty", "holds no question"), ("binary", "not UTF-8 text")):
        with pytest.raises(InputError, match=f"{tmp_path / name}: {fault}"):
            read_task(tmp_path / name)


# When a text is right.


@pytest.mark.parametrize(
    ("answer", "text", "right"),
    [
        (GSM8K, " 2 and 3 make 5, so it is $1234.00.", True),
        (GSM8K, "She has 1,234 of 5", False),  # the last number counts
        (GSM8K, "5 + 5\n#### 1234\nQuestion: 7", True),  # but the one behind the mark, where there is one
        (GSM8K, "no number", False),
        ("#### -3.5", "it falls by -3.5", True),
        ("42", " 42", True),
        ("42", " The answer is 42.", True),
        ("42", " 41\n42", False),  # one line is asked for
        ("$1,000", " 1000 dollars", True),
        ("50%", " 50", True),
        ("Paris", " paris.", True),
        ("Paris", "\n Paris ", True),
        ("Paris", " Paris is the capital", False),
        ("New  York", "new york!", True),
        ("Paris", "", False),
    ],
)
def test_exact_answers(answer: str, text: str, right: bool) -> None:
    assert is_right(Question(1, "Q", answer), text) is right


def test_where_an_answer_ends() -> None:
    """A line; where reasoning comes first, the next question."""
    assert Question(1, "Q", "42").stops == ("\n",)
    assert Question(1, "Q", GSM8K).stops == ("\nQuestion:",)


def test_numbers_and_normal_forms() -> None:
    assert last_number("7 of 1,250,000.5 km") == 1250000.5
    assert last_number("none") is None
    assert normalized('  "The END",  then. ') == 'the end", then'
