"""Task files: JSON lines of questions with exact answers or choices."""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantlab.errors import InputError

MOST_FAULTS = 10  # listed of one file
REASONED = "####"  # GSM8K's mark between the reasoning and the number (Cobbe et al. 2021, arXiv 2110.14168)
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
STOPS_LINE, STOPS_QUESTION = ("\n",), ("\nQuestion:",)


@dataclass(frozen=True)
class Question:
    """One row. `prompt` is what the model continues; `answer` is the exact answer, or of `choices` the right one's
    number; `line` counts from 1.
    """

    line: int
    prompt: str
    answer: str | int
    choices: tuple[str, ...] = ()

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
    try:
        lines = path.read_bytes().decode("utf-8").split("\n")  # a text in JSON may hold other line breaks
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}); a task is a file of JSON lines") from None
    questions, faults = [], []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                questions.append(_question(number, line))
            except ValueError as error:
                faults.append(f"line {number}: {error}")
    if faults:
        more = f"; and {len(faults) - MOST_FAULTS} more" if len(faults) > MOST_FAULTS else ""
        raise InputError(f"{path}: {len(faults)} bad rows: {'; '.join(faults[:MOST_FAULTS])}{more}")
    if not questions:
        raise InputError(f"{path}: holds no question")
    if limit is None or limit >= len(questions):
        return questions
    if seed is None:
        return questions[:limit]
    chosen = random.Random(seed).sample(range(len(questions)), limit)  # noqa: S311 no secret
    return [questions[index] for index in sorted(chosen)]


def _question(number: int, line: str) -> Question:
    """One row.

    Raises:
        ValueError: what is wrong with it.
    """
    try:
        row: Any = json.loads(line)  # Any: unchecked JSON
    except (ValueError, RecursionError):
        raise ValueError("is no JSON") from None
    if not isinstance(row, dict):
        raise ValueError("is no JSON object")
    named = [key for key in ("question", "prompt") if key in row]
    if len(named) != 1:
        raise ValueError('needs either "question" or "prompt"')
    text = row[named[0]]
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f'"{named[0]}" is no text')
    if "answer" not in row:
        raise ValueError('"answer" is missing')
    prompt = plain_prompt(text) if named[0] == "question" else text
    if "choices" not in row:
        return Question(number, prompt, _exact(row["answer"]))
    choices = row["choices"]
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        raise ValueError('"choices" is no list of two texts or more')
    return Question(number, prompt, _chosen(row["answer"], choices), tuple(choices))


def plain_prompt(question: str) -> str:
    """What a model without a template continues with an answer."""
    return f"Question: {question.strip()}\nAnswer:"


def _exact(answer: Any) -> str:
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)):
        raise ValueError('"answer" is neither text nor number')
    text = str(answer)
    gold = text.rpartition(REASONED)[2]
    if not normalized(gold):
        raise ValueError('"answer" is empty')
    if REASONED in text and last_number(gold) is None:
        raise ValueError(f'"answer" has no number behind {REASONED}')
    return text


def _chosen(answer: Any, choices: list[str]) -> int:
    if isinstance(answer, int) and not isinstance(answer, bool):
        if 0 <= answer < len(choices):
            return answer
        raise ValueError(f'"answer" is {answer}; with {len(choices)} choices, 0 to {len(choices) - 1} are possible')
    if isinstance(answer, str):
        letter = answer.strip().upper()
        if len(letter) == 1 and "A" <= letter < chr(ord("A") + len(choices)):
            return ord(letter) - ord("A")
        if choices.count(answer) == 1:
            return choices.index(answer)
    raise ValueError('"answer" is neither number, letter nor text of one of the choices')


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
