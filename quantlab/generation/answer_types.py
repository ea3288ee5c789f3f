"""What an answer is: a number, one of several choices, yes or no, a short text, or whatever is written."""

from __future__ import annotations

import string
from typing import Literal, get_args

from quantlab.errors import InputError

AnswerType = Literal["number", "choice", "yes-no", "text", "free"]
ANSWER_TYPES: tuple[AnswerType, ...] = get_args(AnswerType)
MOST_CHOICES = len(string.ascii_uppercase)
UNKNOWN_CHOICES = 5


def checked_answer_type(name: str) -> AnswerType:
    """An answer type by its name; yes/no may be written so.

    Raises:
        InputError: there is none of that name.
    """
    for answer_type in ANSWER_TYPES:
        if name.replace("/", "-") == answer_type:
            return answer_type
    raise InputError(f"answer type {name!r}: choose one of: {', '.join(ANSWER_TYPES)}")


def letters(choices: int) -> str:
    """The letters of so many choices, from A on; A to E where their number is not known (0)."""
    assert 0 <= choices <= MOST_CHOICES
    return string.ascii_uppercase[: choices or UNKNOWN_CHOICES]
