"""The answer in what a model wrote, by one of two sets of rules, which are the same whatever template asked."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal

from quantlab.errors import InputError
from quantlab.generation.answer_types import AnswerType, letters
from quantlab.generation.kojima import EXAMPLE_PHRASE, published_answer

NOT_IN_SOURCES = "not in the sources"

# The words that announce an answer: "the answer (arabic numerals) is", "answer:", GSM8K's mark, LaTeX's box.
PHRASE = re.compile(r"\banswer\b[^.\n]{0,40}?(?:\bis\b:?|:|=)|####|\\boxed\{", re.IGNORECASE)
NEXT_QUESTION = re.compile(r"\n\s*(?:Q|Question):")
# Commas part groups of three digits. A hyphen behind a letter, a digit or a bracket is no minus, digits behind a letter
# no number.
NUMBER = re.compile(
    r"(?<!\w)(?<!\d\.)(?:(?<![)\]])[-\u2212])?(?:[$€£][-\u2212]?)?(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
)
YES_NO = re.compile(r"(?<![\w'-])(yes|no)(?![\w'-])", re.IGNORECASE)
SENTENCE_END = re.compile(r"(?:(?<=[^\W\d_]{3}[.!?])|(?<=\d[.!?]))\s")
CITATION = re.compile(r"\s*\[\d+(?:\s*,\s*\d+)*\]")
ENDS = " \t\r\n.,;:!?\"'`*()[]{}"


@dataclass(frozen=True)
class Written:
    """What a model wrote, and the words before it that asked for the answer (empty: none did)."""

    text: str
    trigger: str = ""


def extracted_answer(written: Written, answer_type: AnswerType, choices: tuple[str, ...], rules: str) -> str:
    """The answer as a text of one spelling, so that equal answers are equal texts; empty if there is none.

    That the sources do not hold it is an answer too, under either set of rules: `NOT_IN_SOURCES`.

    Args:
        rules: a name of `RULES`.
    """
    return RULES[rules](written, answer_type, choices)


def reference_answer(reference: str, answer_type: AnswerType, rules: str) -> str:
    """A task's own answer in the spelling in which `extracted_answer` gives a right one."""
    if rules == "kojima":
        return reference.lower() if answer_type == "yes-no" else reference
    if answer_type == "number":
        return next(iter(_numbers(reference)), reference)
    return reference.upper() if answer_type == "choice" else plain_words(reference)


def checked_rules(name: str) -> str:
    """The name of a set of rules.

    Raises:
        InputError: there is none of that name.
    """
    if name not in RULES:
        raise InputError(f"answer rules {name!r}: choose one of: {', '.join(RULES)}")
    return name


def _published(written: Written, answer_type: AnswerType, choices: tuple[str, ...]) -> str:
    if _is_not_there(written.text.rpartition(EXAMPLE_PHRASE)[2]):
        return NOT_IN_SOURCES
    return published_answer(written.text, answer_type, len(choices), asked_for=bool(written.trigger))


def _strict(written: Written, answer_type: AnswerType, choices: tuple[str, ...]) -> str:
    """The first match behind the last words that announce an answer, be they the model's or the template's; without
    such words the last match of all. What the model wrote of a next question does not count.
    """
    own = NEXT_QUESTION.split(written.text)[0]
    text = f"{written.trigger} {own}" if written.trigger else own
    announced = list(PHRASE.finditer(text))
    piece = text[announced[-1].end() :] if announced else text
    if _is_not_there(piece):
        return NOT_IN_SOURCES
    if answer_type == "free":  # behind a reasoning the line that was asked for, else all of it
        return _first_line(piece) if written.trigger else own.strip()
    found = _FINDERS[answer_type](piece, choices)
    if not found:
        return ""
    return found[0] if announced else found[-1]


def _is_not_there(text: str) -> bool:
    return NOT_IN_SOURCES in NEXT_QUESTION.split(text)[0].lower()


def _numbers(text: str, _: tuple[str, ...] = ()) -> list[str]:
    """All numbers, without commas, currency signs, and zeros that mean nothing."""
    return [_plain_number(match[0]) for match in NUMBER.finditer(text)]


def _plain_number(text: str) -> str:
    is_negative = "-" in text or "\u2212" in text
    value = Decimal(re.sub(r"[^\d.]", "", text))
    digits = format(value, "f")
    digits = digits.rstrip("0").rstrip(".") if "." in digits else digits
    digits = digits.lstrip("0") or "0"
    digits = f"0{digits}" if digits.startswith(".") else digits
    return f"-{digits}" if is_negative and value else digits


def _letters(text: str, choices: tuple[str, ...]) -> list[str]:
    """Letters in parentheses; else those that stand alone and are no article or pronoun; else the one choice whose text
    is there.
    """
    known = letters(len(choices))
    if found := re.findall(rf"\(([{known}{known.lower()}])\)", text):
        return [letter.upper() for letter in found]
    if found := re.findall(rf"(?<![\w'])([{known}])(?![\w'])(?!(?<=[AI]) [a-z])", text):
        return found
    said = plain_words(text)
    named = [
        letter
        for letter, choice in zip(known, choices, strict=False)
        if re.search(rf"(?<!\w){re.escape(plain_words(choice))}(?!\w)", said)
    ]
    return named if len(named) == 1 else []


def _yes_or_no(text: str, _: tuple[str, ...]) -> list[str]:
    return [word.lower() for word in YES_NO.findall(text)]


def _short_text(text: str, _: tuple[str, ...]) -> list[str]:
    """The first line, up to the end of its sentence; the full stop of "Dr." is none."""
    return [plain_words(SENTENCE_END.split(CITATION.sub("", _first_line(text)).strip())[0])]


def _first_line(text: str) -> str:
    """That says something."""
    return next((line.strip() for line in text.splitlines() if plain_words(line)), "")


def plain_words(text: str) -> str:
    """Lower case, one space between words, no citations, and no punctuation at the ends."""
    return " ".join(CITATION.sub("", text).lower().split()).strip(ENDS)


_FINDERS: dict[AnswerType, Callable[[str, tuple[str, ...]], list[str]]] = {
    "number": _numbers,
    "choice": _letters,
    "yes-no": _yes_or_no,
    "text": _short_text,
}
RULES: dict[str, Callable[[Written, AnswerType, tuple[str, ...]], str]] = {"strict": _strict, "kojima": _published}
