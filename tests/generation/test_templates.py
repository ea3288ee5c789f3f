"""Templates: the exact texts of every one, how they compose, and what they refuse."""

from __future__ import annotations

from dataclasses import replace

import pytest

from quantlab.errors import InputError
from quantlab.generation.examples import Example
from quantlab.generation.kojima import direct_trigger, extraction_trigger
from quantlab.generation.prompts import Prompt, messages, plain_text, without_system
from quantlab.generation.sources import GivenSource, numbered_sources, within_budget
from quantlab.generation.templates import EXPERT, TEMPLATES, Asked, Form, Template, find_template, form_of

QUESTION = "What is 2 + 3?"
SOURCES = (GivenSource("a.md", "Two and three make five."), GivenSource("b.md", "Four is even.\n"))
EXAMPLES = (Example("What is 1 + 1?", "2", "One and one more."), Example("What is 4 + 4?", "8", "Twice four."))
ASKED = Asked(QUESTION, "number", passages=SOURCES, examples=EXAMPLES)
SOURCES_TEXT = (
    "Answer from the numbered sources below and name the ones you use, like [1]. "
    'If they do not hold the answer, say "not in the sources".\n\n'
    "[1] Two and three make five.\n[2] Four is even.\n\n"
)


def form(name: str, asked: Asked = ASKED) -> Form:
    return form_of(find_template(name), asked)


# The paper's strings.


def test_zero_shot_is_the_papers() -> None:
    asked = form("zero-shot")
    assert plain_text(asked.prompt) == "Q: What is 2 + 3?\nA: The answer (arabic numerals) is"
    assert asked.trigger == "The answer (arabic numerals) is"
    assert asked.then is None


def test_zero_shot_cot_is_the_papers_two_steps() -> None:
    asked = form("zero-shot-cot")
    assert plain_text(asked.prompt) == "Q: What is 2 + 3?\nA: Let's think step by step."
    assert asked.then == "\nTherefore, the answer (arabic numerals) is"
    assert asked.trigger == ""  # the reasoning's text holds no answer yet


def test_few_shot_is_the_papers() -> None:
    shown = "Q: What is 1 + 1?\nA: {}The answer is 2.\n\nQ: What is 4 + 4?\nA: {}The answer is 8.\n\n"
    asked = "Q: What is 2 + 3?\nA:"
    assert plain_text(form("few-shot").prompt) == shown.format("", "") + asked
    assert plain_text(form("few-shot-cot").prompt) == shown.format("One and one more. ", "Twice four. ") + asked
    assert form("few-shot-cot").then is None
    assert form("few-shot").trigger == form("few-shot-cot").trigger == ""


@pytest.mark.parametrize(
    ("answer_type", "choices", "direct", "then"),
    [
        ("number", 0, "The answer (arabic numerals) is", "\nTherefore, the answer (arabic numerals) is"),
        ("choice", 5, "Among A through E, the answer is", "\nTherefore, among A through E, the answer is"),
        ("choice", 3, "Among A through C, the answer is", "\nTherefore, among A through C, the answer is"),
        ("choice", 0, "Among A through E, the answer is", "\nTherefore, among A through E, the answer is"),
        ("yes-no", 0, "The answer (Yes or No) is", "\nTherefore, the answer (Yes or No) is"),
        ("text", 0, "The answer is", "\nTherefore, the answer is"),
    ],
)
def test_the_papers_phrases_by_type(answer_type, choices: int, direct: str, then: str) -> None:
    assert direct_trigger(answer_type, choices) == direct
    assert extraction_trigger(answer_type, choices) == then


def test_choices_follow_the_question() -> None:
    asked = Asked(" Which? ", "choice", ("red", "a cat"), examples=(Example("Who?", "B", choices=("I", "you")),))
    assert plain_text(form("few-shot", asked).prompt) == (
        "Q: Who? Answer Choices: (A) I (B) you\nA: The answer is B.\n\nQ: Which? Answer Choices: (A) red (B) a cat\nA:"
    )


# The others, and compositions.


def test_an_answer_of_any_kind_is_not_prompted_for() -> None:
    """Nothing is put into the model's mouth, and examples' answers stay as they are."""
    asked = replace(ASKED, answer_type="free")
    assert plain_text(form("zero-shot", asked).prompt) == "Q: What is 2 + 3?\nA:"
    shown = plain_text(form("few-shot", asked).prompt)
    assert shown.startswith("Q: What is 1 + 1?\nA: 2\n\nQ: What is 4 + 4?\nA: 8\n\n")
    assert form("zero-shot-cot", asked).then == "\nTherefore, the answer is"


def test_roles() -> None:
    told = plain_text(form("role", replace(ASKED, role="You are a clerk.")).prompt)
    assert told == "You are a clerk.\n\nQ: What is 2 + 3?\nA: The answer (arabic numerals) is"
    assert form("role").prompt.system == EXPERT == "You are an expert in the subject of the question."
    assert form("zero-shot").prompt.system == ""
    assert form("rag", replace(ASKED, role="You are a clerk.")).prompt.system == ""
    assert form("rag+role", replace(ASKED, role="You are a clerk.")).prompt.system == "You are a clerk."


def test_sources_are_numbered_behind_an_instruction() -> None:
    assert plain_text(form("rag").prompt) == f"{SOURCES_TEXT}Q: What is 2 + 3?\nA: The answer (arabic numerals) is"
    assert numbered_sources(()).endswith('say "not in the sources".\n\n(no source was found)')


def test_pieces_compose() -> None:
    reasoned = form("rag+cot")
    assert plain_text(reasoned.prompt) == f"{SOURCES_TEXT}Q: What is 2 + 3?\nA: Let's think step by step."
    assert reasoned.then == "\nTherefore, the answer (arabic numerals) is"
    assert find_template("few-shot+cot") == TEMPLATES["few-shot-cot"]
    assert find_template("zero-shot+rag") == TEMPLATES["rag"]
    assert find_template("cot+votes") == TEMPLATES["self-consistency"]
    assert find_template("zero-shot+votes") == Template(samples=5, temperature=0.7)
    all_of_it = find_template("few-shot-cot+rag+role+self-consistency")
    assert all_of_it == Template(
        examples=True, role=True, passages="given", reasoning="written", samples=5, temperature=0.7
    )
    text = plain_text(form_of(all_of_it, ASKED).prompt)
    assert text.startswith(f"{EXPERT}\n\nQ: What is 1 + 1?\nA: One and one more. The answer is 2.\n\n")
    assert text.endswith(f"A: Twice four. The answer is 8.\n\n{SOURCES_TEXT}Q: What is 2 + 3?\nA:")


def test_controls_differ_in_one_piece() -> None:
    assert TEMPLATES["closed-book"] == TEMPLATES["zero-shot"]
    assert plain_text(form("irrelevant-trigger").prompt) == "Q: What is 2 + 3?\nA: Abrakadabra!"
    assert replace(TEMPLATES["irrelevant-trigger"], trigger=Template().trigger) == TEMPLATES["zero-shot-cot"]
    assert form("filler") == form("zero-shot-cot")
    for control in ("oracle", "rag-shuffled", "rag-other"):
        assert replace(TEMPLATES[control], passages="given") == TEMPLATES["rag"]
        assert find_template(control).is_control
    assert not find_template("rag+cot").is_control


def test_what_asks_for_the_answer_can_be_exchanged() -> None:
    direct = form_of(TEMPLATES["zero-shot"], ASKED, "In figures:")
    assert plain_text(direct.prompt).endswith("\nA: In figures:")
    assert direct.trigger == "In figures:"
    assert form_of(TEMPLATES["cot"], ASKED, "In figures:").then == "In figures:"
    assert plain_text(form_of(TEMPLATES["zero-shot"], ASKED, "").prompt).endswith("\nA:")


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("cot-zero", "template 'cot-zero': choose one of: zero-shot, few-shot, role, zero-shot-cot, few-shot-cot, "),
        ("rag+nothing", "template 'nothing': choose one of: "),
        ("rag+oracle", r"template rag\+oracle: its parts exclude each other: two kinds of passages"),
        ("cot+filler", "two kinds of reasoning"),
        ("none.jinja", "none.jinja: cannot be read: No such file or directory"),
    ],
)
def test_names_that_there_are_not(name: str, fault: str) -> None:
    with pytest.raises(InputError, match=fault):
        find_template(name)


def test_pieces_that_are_missing() -> None:
    with pytest.raises(InputError, match="the question is empty"):
        form("zero-shot", Asked(" \n"))
    with pytest.raises(InputError, match="worked examples are missing; give a file of them with --examples"):
        form("few-shot", Asked(QUESTION))
    with pytest.raises(InputError, match='the example "What is 1" shows no reasoning'):
        form("few-shot-cot", Asked(QUESTION, examples=(EXAMPLES[0], Example("What is 1", "1"))))


# Messages for a chat template.


def test_messages_carry_the_same_pieces() -> None:
    """Examples as turns, passages before the question in its message, the beginning of the answer left out."""
    written = messages(form("few-shot-cot+rag+role").prompt)
    assert [message["role"] for message in written] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert written[0]["content"] == EXPERT
    assert written[2]["content"] == "One and one more. The answer is 2."
    assert written[-1]["content"] == f"{SOURCES_TEXT}What is 2 + 3?"
    assert messages(form("zero-shot-cot").prompt) == [{"role": "user", "content": QUESTION}]


def test_a_system_message_can_go_to_the_users_first() -> None:
    written = without_system(messages(form("few-shot+role").prompt))
    assert [message["role"] for message in written] == ["user", "assistant", "user", "assistant", "user"]
    assert written[0]["content"] == f"{EXPERT}\n\nWhat is 1 + 1?"


def test_a_whole_prompt_stays_as_it_is() -> None:
    assert plain_text(Prompt("Summarize: x\n=>", is_whole=True)) == "Summarize: x\n=>"


# The budget of passages.


def words(text: str) -> int:
    return len(text.split())


LONG = [GivenSource(name, " ".join(f"{name}{number}" for number in range(20))) for name in "abc"]


def test_passages_are_kept_by_rank_within_the_budget() -> None:
    """A word is a token here. What is left of the budget takes the beginning of the next one."""
    assert within_budget(LONG, 60, words) == tuple(LONG)
    first, second = within_budget(LONG, 37, words)
    assert first == LONG[0]
    assert second == GivenSource("b", " ".join(f"b{number}" for number in range(17)))
    assert within_budget(LONG, 35, words) == (LONG[0],)  # 15 tokens of the second would say nothing
    assert within_budget((), 0, words) == ()


def test_a_budget_that_holds_no_passage() -> None:
    with pytest.raises(InputError, match="15 tokens for passages hold not even the beginning of the first"):
        within_budget(LONG, 15, words)
