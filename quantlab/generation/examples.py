"""Worked examples for few-shot prompts, from files of JSON lines."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantlab.errors import InputError
from quantlab.generation.answer_types import letters
from quantlab.generation.json_rows import read_rows

REASONED = "####"  # GSM8K's mark between the reasoning and the number (Cobbe et al. 2021, arXiv 2110.14168)
CALCULATION = re.compile(r"<<[^<>\n]*>>")  # GSM8K's marks for a calculator, which no reader sees
EXAMPLES = 8  # as many as the chain-of-thought papers show (Wei et al. 2022, arXiv 2201.11903)


@dataclass(frozen=True)
class Example:
    """A question with its answer (of choices the letter), and how to get there, which may be empty."""

    question: str
    answer: str
    reasoning: str = ""
    choices: tuple[str, ...] = ()


def read_examples(path: Path, number: int = EXAMPLES) -> tuple[Example, ...]:
    """The first examples of a file: rows of "question", "answer" and maybe "reasoning" and "choices".

    GSM8K's answers, reasoning and number in one, are parted at their ####.

    Raises:
        InputError: fewer than one is asked for, the file cannot be read, or rows are wrong, by their lines.
    """
    if number < 1:
        raise InputError(f"{number} worked examples: at least one must be shown")
    return tuple(read_rows(path, _example, "a set of examples", "no example", number))


def _example(_: int, row: dict[str, Any]) -> Example:
    question = row.get("question")
    if not isinstance(question, str) or not question.strip():
        raise ValueError('"question" is no text')
    reasoning = row.get("reasoning", "")
    if not isinstance(reasoning, str):
        raise ValueError('"reasoning" is no text')
    choices = row_choices(row)
    if choices:
        right = letters(len(choices))[chosen(row.get("answer"), choices)]
        return Example(question.strip(), right, reasoning.strip(), choices)
    answer = answer_text(row.get("answer"))
    if REASONED in answer and not reasoning:
        worked, answer = answer.rsplit(REASONED, 1)
        reasoning = " ".join(CALCULATION.sub("", worked).split())
    return Example(question.strip(), answer.strip(), reasoning.strip())


def row_choices(row: dict[str, Any]) -> tuple[str, ...]:
    """The choices of a row, none where it has none.

    Raises:
        ValueError: they are no list of at least two texts.
    """
    choices = row.get("choices", [])
    if "choices" not in row:
        return ()
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        raise ValueError('"choices" is no list of two texts or more')
    return tuple(choices)


def answer_text(answer: object) -> str:
    """An exact answer as text.

    Raises:
        ValueError: it is neither text nor number, or empty.
    """
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)):
        raise ValueError('"answer" is neither text nor number')
    text = str(answer)
    if not text.strip():
        raise ValueError('"answer" is empty')
    return text


def chosen(answer: object, choices: tuple[str, ...]) -> int:
    """Which choice an answer is: its number from 0, its letter from A, or its text.

    Raises:
        ValueError: it is none of them.
    """
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
