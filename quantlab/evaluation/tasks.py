"""Task files: JSON lines of questions with exact answers or choices."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantlab.errors import InputError
from quantlab.generation.examples import REASONED, answer_text, chosen, row_choices
from quantlab.generation.json_rows import read_rows

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
STOPS_LINE, STOPS_QUESTION = ("\n",), ("\nQuestion:",)


@dataclass(frozen=True)
class Question:
    """One row. `prompt` is what the model continues; `answer` is the exact answer, or of `choices` the right one's
    number; `line` counts from 1. `row` is all that the row says.
    """

    line: int
    prompt: str
    answer: str | int
    choices: tuple[str, ...] = ()
    row: Mapping[str, Any] = field(default_factory=dict, compare=False)  # Any: unchecked JSON

    @property
    def reasoned(self) -> bool:
        """Whether the answer follows a reasoning, so that its last number counts."""
        return isinstance(self.answer, str) and REASONED in self.answer

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings that end an exact answer: a line, or where reasoning precedes it the next question."""
        return STOPS_QUESTION if self.reasoned else STOPS_LINE


def read_task(path: Path, limit: int | None = None, seed: int | None = None) -> list[Question]:
    """The questions of a JSON-lines file; of a `limit` the first ones, or with `seed` that many drawn at random.

    A row has "question" (put into a plain prompt) or "prompt" (continued as it is), and "answer": a text or number, or,
    beside "choices" (a list of texts), the right one's number from 0, its letter from A, or its text.

    Raises:
        InputError: the file cannot be read, holds no question, a limit below 1, or rows that are wrong, by their lines.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit {limit}: at least 1 is needed")
    questions = read_rows(path, _question, "a task", "no question")
    if limit is None or limit >= len(questions):
        return questions
    if seed is None:
        return questions[:limit]
    drawn = random.Random(seed).sample(range(len(questions)), limit)  # noqa: S311 no secret
    return [questions[index] for index in sorted(drawn)]


def _question(number: int, row: dict[str, Any]) -> Question:
    """One row.

    Raises:
        ValueError: what is wrong with it.
    """
    named = [key for key in ("question", "prompt") if key in row]
    if len(named) != 1:
        raise ValueError('needs either "question" or "prompt"')
    text = row[named[0]]
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f'"{named[0]}" is no text')
    if "answer" not in row:
        raise ValueError('"answer" is missing')
    prompt = plain_prompt(text) if named[0] == "question" else text
    choices = row_choices(row)
    answer = chosen(row["answer"], choices) if choices else _exact(row["answer"])
    return Question(number, prompt, answer, choices, row)


def plain_prompt(question: str) -> str:
    """What a model without a template continues with an answer."""
    return f"Question: {question.strip()}\nAnswer:"


def _exact(answer: object) -> str:
    text = answer_text(answer)
    gold = text.rpartition(REASONED)[2]
    if not normalized(gold):
        raise ValueError('"answer" is empty')
    if REASONED in text and last_number(gold) is None:
        raise ValueError(f'"answer" has no number behind {REASONED}')
    return text


def is_right(question: Question, text: str) -> bool:
    """Whether a generated text gives the exact answer.

    Where the answer is reasoned, the text's last number counts (the one behind its `####`, if it writes one); where the
    answer is a number, the last number of the text's first line; else the whole first line, without case, punctuation
    at its ends, and runs of space.
    """
    assert isinstance(question.answer, str)
    gold = question.answer.rpartition(REASONED)[2]
    if question.reasoned:
        said = text.partition(REASONED)[2].partition("\n")[0] if REASONED in text else text
        return last_number(said) == last_number(gold)
    first = next((line for line in text.splitlines() if line.strip()), "")
    number = whole_number(gold)
    if number is not None:
        return last_number(first) == number
    return normalized(first) == normalized(gold)


def last_number(text: str) -> float | None:
    """The last number in a text; commas part thousands."""
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def whole_number(text: str) -> float | None:
    """The number that a text is, with or without a currency sign before or a percent sign or full stop behind it."""
    bare = text.strip().lstrip("$€£").rstrip("%.").strip()
    return last_number(bare) if NUMBER.fullmatch(bare) else None


def normalized(text: str) -> str:
    """Lower case, one space between words, no punctuation at the ends."""
    return " ".join(text.lower().split()).strip(" .,;:!?\"'")
