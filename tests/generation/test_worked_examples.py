"""Files of worked examples: GSM8K's rows as they are, choices, a number of them, and bad rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quantlab.errors import InputError
from quantlab.generation.examples import Example, read_examples


def file_of(folder: Path, *rows: object) -> Path:
    path = folder / "examples.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_rows_of_every_kind(tmp_path: Path) -> None:
    """The marks for GSM8K's calculator are not shown; of choices the letter is the answer."""
    path = file_of(
        tmp_path,
        {"question": " What is 1 + 1? ", "answer": 2},
        {"question": "Apples?", "answer": "He buys 2 + 3 = <<2+3=5>>5.\nThey cost 1,234.\n#### 1,234"},
        {"question": "Why?", "answer": "So.", "reasoning": " Because. "},
        {"question": "Which?", "answer": 1, "choices": ["red", "green"]},
    )
    assert read_examples(path) == (
        Example("What is 1 + 1?", "2"),
        Example("Apples?", "1,234", "He buys 2 + 3 = 5. They cost 1,234."),
        Example("Why?", "So.", "Because."),
        Example("Which?", "B", "", ("red", "green")),
    )


def test_the_first_ones_are_taken(tmp_path: Path) -> None:
    """Rows behind them are not even read."""
    path = file_of(tmp_path, *({"question": f"{number}?", "answer": number} for number in range(20)), "no row")
    assert [example.answer for example in read_examples(path, 3)] == ["0", "1", "2"]
    assert len(read_examples(path)) == 8


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ([1], "is no JSON object"),
        ({"answer": 1}, '"question" is no text'),
        ({"question": "a"}, '"answer" is neither text nor number'),
        ({"question": "a", "answer": " "}, '"answer" is empty'),
        ({"question": "a", "answer": 1, "reasoning": 2}, '"reasoning" is no text'),
        ({"question": "a", "answer": 3, "choices": ["x", "y"]}, '"answer" is 3; with 2 choices, 0 to 1 are possible'),
        ({"question": "a", "answer": 0, "choices": "xy"}, '"choices" is no list of two texts or more'),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path: Path, row: object, fault: str) -> None:
    path = file_of(tmp_path, {"question": "a", "answer": "b"}, row)
    with pytest.raises(InputError) as caught:
        read_examples(path)
    assert str(caught.value) == f"{path}: 1 bad rows: line 2: {fault}"


def test_a_file_without_examples(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="0 worked examples: at least one must be shown"):
        read_examples(file_of(tmp_path, {"question": "a", "answer": "b"}), 0)
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(InputError, match="empty: holds no example"):
        read_examples(tmp_path / "empty")
