"""Answers found in what a model wrote: the paper's rules worked by hand, its traps, and a stricter set without them."""

from __future__ import annotations

import pytest

from quantlab.errors import InputError
from quantlab.generation.answer_types import AnswerType, checked_answer_type, letters
from quantlab.generation.answers import (
    NOT_IN_SOURCES,
    Written,
    checked_rules,
    extracted_answer,
    reference_answer,
)
from quantlab.generation.kojima import published_answer

FIVE = ("red", "green", "blue", "a cat", "black")


# The paper's rules.


@pytest.mark.parametrize(
    ("answer_type", "text", "answer"),
    [
        ("number", " 78 - 12 = 66", "78"),  # the first match
        ("number", " $1,234.", "1234"),  # commas deleted, a full stop removed
        ("number", " 12.0", "12.0"),  # as it stands
        ("number", " between 3-5", "3"),
        ("number", " -5 degrees", "-5"),
        ("number", " none", ""),
        ("choice", " C", "C"),
        ("choice", " (D) or (B).", "D"),
        ("choice", " red", ""),
        ("yes-no", " Yes.", "yes"),
        ("yes-no", ' "No", because yes', "no"),
        ("yes-no", " yes!", ""),  # the exclamation mark is not among the signs that become spaces
        ("text", ' "nk".', "nk"),
        ("text", "\nn k\n", "nk"),
        ("text", " ", ""),
        ("free", " All of it. ", "All of it"),
    ],
)
def test_behind_a_trigger_the_first_match_counts(answer_type: AnswerType, text: str, answer: str) -> None:
    assert published_answer(text, answer_type, 5, asked_for=True) == answer


@pytest.mark.parametrize(
    ("answer_type", "text", "answer"),
    [
        ("number", " 3 + 4 = 7. The answer is 7.", "7"),
        ("number", " The answer is 7. Q: 1 + 1? The answer is 2, not 3.", "2"),  # behind the last phrase, its first
        ("number", " 3 + 4 = 7. So 7 + 1 = 8.", "8"),  # without the phrase the last of all
        ("number", " the answer is 7, or 8", "8"),  # in lower case it is not the phrase
        ("choice", " B is wrong. The answer is C.", "C"),
        ("choice", " B is wrong, so C", "C"),
        ("yes-no", " Yes and no.", "no"),
        ("number", " The answer is seven", ""),
    ],
)
def test_without_a_trigger_the_phrase_of_the_examples_decides(answer_type: AnswerType, text: str, answer: str) -> None:
    assert published_answer(text, answer_type, 5, asked_for=False) == answer


def test_the_traps_of_the_published_rules_are_kept() -> None:
    """A capital inside a word, a range's hyphen, more or fewer letters than five."""
    assert published_answer(" the Dog, so C", "choice", 5, asked_for=True) == "D"
    assert published_answer(" F, then C", "choice", 5, asked_for=True) == "C"
    assert published_answer(" F, then C", "choice", 6, asked_for=True) == "F"
    assert published_answer(" D, then C", "choice", 3, asked_for=True) == "C"
    assert published_answer(" it is 3-5", "number", 0, asked_for=False) == "-5"
    assert reference_answer("12", "number", "kojima") != published_answer(" 12.0", "number", 0, asked_for=True)


# The stricter set.


def strict(text: str, answer_type: AnswerType, choices: tuple[str, ...] = (), trigger: str = "") -> str:
    return extracted_answer(Written(text, trigger), answer_type, choices, "strict")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("3 + 4 = 7", "7"),
        ("it is 3-5", "5"),  # no minus
        ("it is (3)-5", "5"),
        ("it falls to -5", "-5"),
        ("it falls to \u22125.50", "-5.5"),
        ("-$1,234.00", "-1234"),
        ("$-12", "-12"),
        ("12.0", "12"),
        ("007", "7"),
        ("0.50", "0.5"),
        (".5", "0.5"),
        ("-0", "0"),
        ("100", "100"),
        ("1,2,3", "3"),  # a list, no thousands
        ("1,234,567.", "1234567"),
        ("H2O and room A4", ""),  # digits in words
        ("5kg", "5"),
        ("50 %", "50"),
        ("version 1.2.3", "1.2"),
        ("none", ""),
        ("2 apples.\nQ: What is 9 + 9?\nA: 18", "2"),  # a next question is not this one's
        ("#### 42", "42"),
        ("so \\boxed{42} of 50", "42"),
        ("The answer is 7. It is not 8.", "7"),
        ("Answer: 7 (of 8)", "7"),
        ("The final answer, in euros, is 7, not 8", "7"),
        ("The answer is 6? No: the answer is 7 of 9", "7"),
        ("9. The answer is seven", ""),  # announced, but no number
    ],
)
def test_numbers(text: str, answer: str) -> None:
    assert strict(text, "number") == answer


def test_a_trigger_of_the_template_announces_as_the_models_own_words_do() -> None:
    """So a rule is the same for every template: first behind the announcement, wherever it stands."""
    trigger = "Therefore, the answer (arabic numerals) is"
    assert strict(" 7 of 8", "number", trigger=trigger) == strict("The answer is 7 of 8", "number") == "7"
    assert strict(" 6. No, the answer is 7", "number", trigger=trigger) == "7"
    assert strict(" 7 of 8", "number") == "8"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("C", "C"),
        ("(c).", "C"),
        ("A dog barks, so B.", "B"),  # an article
        ("A", "A"),
        ("Dogs bark", ""),  # inside a word
        ("F", ""),
        ("It is green", "B"),  # the text of one choice
        ("red or green", ""),  # of two
        ("evergreen", ""),
        ("Not (A) but (D) counts", "D"),
        ("The answer is D, not (A)", "A"),  # parentheses go before
        ("the cat's is a Cat", "D"),  # "a cat" is there
    ],
)
def test_choices(text: str, answer: str) -> None:
    assert strict(text, "choice", FIVE) == answer


def test_letters_of_unknown_choices_reach_to_e() -> None:
    assert letters(0) == "ABCDE"
    assert letters(3) == "ABC"
    assert strict("(E)", "choice") == "E"


@pytest.mark.parametrize(
    ("text", "answer"),
    [("Yes!", "yes"), ("no-one, yes", "yes"), ("I know", ""), ("NO", "no"), ("The answer is no, yes?", "no"), ("", "")],
)
def test_yes_or_no(text: str, answer: str) -> None:
    assert strict(text, "yes-no") == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" Paris.", "paris"),
        ("\n\n The  Old Mill [2]. It burned.", "the old mill"),
        ("the answer is 'Rue St. Honor\u00e9' [1, 3]", "rue st. honor\u00e9"),  # behind two letters no sentence ends
        ("In 1900. Not before.", "in 1900"),
        ("J. Smith", "j. smith"),
        ("It is **Paris**!\nQ: And Rome?", "it is **paris"),
        ("", ""),
    ],
)
def test_short_texts(text: str, answer: str) -> None:
    assert strict(text, "text") == answer


def test_a_free_answer_is_all_of_it() -> None:
    assert strict(" One. Two.\n\nThree. \nQ: Four?", "free") == "One. Two.\n\nThree."
    assert strict(" One. Two.\n\nThree.", "free", trigger="Therefore, the answer is") == "One. Two."  # but one line


def test_what_the_sources_do_not_hold_is_an_answer_of_its_own() -> None:
    """Whatever the type and the rules; not what a reasoning says before the answer."""
    for rules in ("strict", "kojima"):
        for answer_type in ("number", "text", "free"):
            said = Written(" That is Not in the sources [1].", "The answer is")
            assert extracted_answer(said, answer_type, (), rules) == NOT_IN_SOURCES
        reasoned = Written("The year is not in the sources. But 2 + 2. The answer is 4.")
        assert extracted_answer(reasoned, "number", (), rules) == "4"


def test_references_get_the_spelling_of_answers() -> None:
    assert reference_answer("$1,234.00", "number", "strict") == "1234"
    assert reference_answer("1,234", "number", "kojima") == "1,234"  # as in the authors' code: never equal
    assert reference_answer("b", "choice", "strict") == "B"
    assert reference_answer("Yes", "yes-no", "strict") == reference_answer("Yes", "yes-no", "kojima") == "yes"
    assert reference_answer(" The  Mill. ", "text", "strict") == "the mill"


def test_unknown_names() -> None:
    assert checked_answer_type("yes/no") == "yes-no"
    with pytest.raises(InputError, match="answer type 'date': choose one of: number, choice, yes-no, text, free"):
        checked_answer_type("date")
    with pytest.raises(InputError, match="answer rules 'lax': choose one of: strict, kojima"):
        checked_rules("lax")
