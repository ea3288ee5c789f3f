"""Zero-shot chain of thought as published: its phrases, and how it finds an answer (Kojima et al. 2022, arXiv
2205.11916, and the authors' code).
"""

from __future__ import annotations

import re

from quantlab.generation.answer_types import AnswerType, letters

REASONING_TRIGGER = "Let's think step by step."
IRRELEVANT_TRIGGER = "Abrakadabra!"  # of the paper's controls
EXAMPLE_PHRASE = "The answer is"  # before the answer of a worked example
REASONING_TOKENS, ANSWER_TOKENS = 128, 32

_PHRASES = {"number": "the answer (arabic numerals) is", "yes-no": "the answer (Yes or No) is"}


def answer_phrase(answer_type: AnswerType, choices: int = 0) -> str:
    """What asks for an answer of that type, of so many choices."""
    if answer_type == "choice":
        return f"among A through {letters(choices)[-1]}, the answer is"
    return _PHRASES.get(answer_type, "the answer is")


def direct_trigger(answer_type: AnswerType, choices: int = 0) -> str:
    """What an answer without reasoning begins with."""
    phrase = answer_phrase(answer_type, choices)
    return phrase[0].upper() + phrase[1:]


def extraction_trigger(answer_type: AnswerType, choices: int = 0) -> str:
    """What asks for the answer behind a reasoning and one space."""
    return f"\nTherefore, {answer_phrase(answer_type, choices)}"


def question_with_choices(question: str, choices: tuple[str, ...]) -> str:
    """A question and what it may be answered with, by letter."""
    if not choices:
        return question
    listed = " ".join(f"({letter}) {choice}" for letter, choice in zip(letters(len(choices)), choices, strict=True))
    return f"{question} Answer Choices: {listed}"


def worked_answer(answer: str, reasoning: str = "") -> str:
    """The answer of an example, behind its reasoning if there is one."""
    return " ".join(part for part in (reasoning, f"{EXAMPLE_PHRASE} {answer}.") if part)


def published_answer(text: str, answer_type: AnswerType, choices: int, *, asked_for: bool) -> str:
    """The answer in what a model wrote, by the paper's rules; empty if there is none.

    Behind a trigger that asks for the answer the first match counts. Else (few-shot) that is so behind the last "The
    answer is", and without these words the last match of all counts.

    Known traps are kept: a capital inside a word is a choice, the hyphen of a range a minus, 12.0 is not 12.

    Args:
        asked_for: whether the text follows such a trigger.
    """
    takes_first = asked_for
    if not asked_for:
        pieces = text.split(EXAMPLE_PHRASE)
        text, takes_first = pieces[-1], len(pieces) > 1
    found = _matches(text, answer_type, choices)
    if not found:
        return ""
    return found[0 if takes_first else -1].removesuffix(".")


def _matches(text: str, answer_type: AnswerType, choices: int) -> list[str]:
    if answer_type == "number":
        return re.findall(r"-?\d+\.?\d*", text.replace(",", ""))
    if answer_type == "choice":
        return re.findall("|".join(letters(choices)), text)
    if answer_type == "yes-no":
        return [word for word in re.sub(r"[\"'\n.\s:,]", " ", text.lower()).split(" ") if word in ("yes", "no")]
    if answer_type == "text":
        squeezed = re.sub(r"[\"'\n.\s]", "", text)
        return [squeezed] if squeezed else []
    return [text.strip()]
