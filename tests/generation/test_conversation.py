"""Conversations: requests that extend what is cached, within the context, and what leaves it."""

from __future__ import annotations

import pytest
from chat_templates import CASES, CHATML, MOVES_SYSTEM, THOUGHTS, byte_level, sentencepiece, spelt

from quantlab import InputError
from quantlab.checkpoint.chat_text import chat_ids
from quantlab.generation.chat_layout import chat_layout
from quantlab.generation.conversation import Conversation

QUESTIONS = ("Where do the ships go?", "Who is on them?", "And then?")
ANSWERS = ("To the islands.", "An old king and\nhis daughter.", "They come back.")


@pytest.mark.parametrize("name", CASES)
def test_a_turn_computes_the_new_message_alone(name: str) -> None:
    """With templates that only add, what is computed of a later request is its own text: the end of the last turn, the
    message and what asks for the answer, never an answer again, although its tokens are not those of its text.
    """
    case = CASES[name]
    layout = chat_layout(case.template, case.words())
    conversation = Conversation(layout, 2000, system="Be kind.")
    cached: list[int] = []
    for number, (question, answer) in enumerate(zip(QUESTIONS, ANSWERS, strict=True)):
        request = conversation.question(question)
        if number:
            assert request.token_ids[: len(cached)] == cached
            alone = Conversation(layout, 2000).question(question).token_ids
            assert len(request.token_ids) - len(cached) <= len(alone) + 1  # a line break behind the turn before
        space = " " if name == "brackets" else ""
        drawn = spelt(layout.tokenizer, space + answer, case.end)
        conversation.answered(request, space + answer, drawn)
        cached = [*request.token_ids, *drawn]
    assert [message["content"] for message in conversation.messages[1::2]] == list(ANSWERS)
    assert cached != chat_ids(layout.tokenizer.decode(cached, skip_special_tokens=False), layout.tokenizer)


def test_plain_text_keeps_the_stop_string_that_was_drawn() -> None:
    """It is the beginning of the next turn."""
    layout = chat_layout(None, sentencepiece())
    conversation = Conversation(layout, 2000)
    request = conversation.question(QUESTIONS[0])
    drawn = spelt(layout.tokenizer, " To the islands.\nUser:")
    conversation.answered(request, " To the islands.", drawn)
    after = conversation.question(QUESTIONS[1]).token_ids
    assert after[: len(request.token_ids) + len(drawn)] == [*request.token_ids, *drawn]
    assert conversation.messages[1]["content"] == "To the islands."


def test_thoughts_that_the_template_drops_are_computed_without() -> None:
    """Only the last answer changes: what was asked before it stays cached."""
    layout = chat_layout(THOUGHTS, byte_level())
    conversation = Conversation(layout, 2000)
    first = conversation.question(QUESTIONS[0])
    text = "<think>hm</think>To the islands."
    conversation.answered(first, text, spelt(layout.tokenizer, text, "<|im_end|>"))
    assert conversation.messages[1]["content"] == text
    second = conversation.question(QUESTIONS[1])
    assert second.token_ids[: len(first.token_ids)] == first.token_ids
    written = layout.tokenizer.decode(second.token_ids, skip_special_tokens=False)
    assert written == layout.text(second.messages)
    assert "hm" not in written


def test_a_system_prompt_that_moves_costs_the_last_turn() -> None:
    """What was before it stays cached."""
    layout = chat_layout(MOVES_SYSTEM, byte_level())
    assert not layout.folds_system
    conversation = Conversation(layout, 2000, system="Be kind.")
    for question, answer in zip(QUESTIONS, ANSWERS, strict=True):
        request = conversation.question(question)
        conversation.answered(request, answer, spelt(layout.tokenizer, answer, "<|end_of_text|>"))
    assert conversation.messages[-1]["content"] == ANSWERS[-1]
    last = conversation.question("Why?").token_ids
    asked = layout.tokenizer.encode("<turn>Be kind.\n\nWhy?</turn>", add_special_tokens=False)
    before = layout.tokenizer.encode(f"<turn>{QUESTIONS[-1]}</turn>{ANSWERS[-1]}<|end_of_text|>")
    assert last[-len(before) - len(asked) :] == [*before, *asked]
    same = len(last) - len(before) - len(asked)
    assert same > len(asked)
    assert last[:same] == request.token_ids[:same]


@pytest.mark.parametrize(
    ("drawn", "kept"),
    [
        ("Yes.", "Yes."),
        ("\nYes.\n", "\nYes.\n"),  # ChatML writes it back as it was drawn
        ("Yes.\ufffd", "Yes."),  # stopped within a character
        ("", ""),
    ],
)
def test_an_answer_is_kept_as_the_layout_writes_it_back(drawn: str, kept: str) -> None:
    layout = chat_layout(CHATML, byte_level())
    conversation = Conversation(layout, 2000)
    request = conversation.question("Hi")
    text = drawn.rstrip("\ufffd")
    conversation.answered(request, drawn, byte_level().encode(text + "<|im_end|>", add_special_tokens=False))
    assert conversation.messages[1] == {"role": "assistant", "content": kept}


# What the context does not hold.


def talked(limit: int, turns: int, **options: str) -> Conversation:
    """A conversation of equal turns in plain text."""
    layout = chat_layout(None, sentencepiece())
    conversation = Conversation(layout, limit, system="Be kind.", **options)
    for _ in range(turns):
        conversation.answered(conversation.question("Where do the ships go?"), "To the islands.", [])
    return conversation


def length(turns: int) -> int:
    """Of a request with so many answered turns before it."""
    return len(talked(10_000, turns).question("Where do the ships go?").token_ids)


def test_the_oldest_turns_are_left_out() -> None:
    """Whole turns, until the rest takes half of the limit; the system prompt stays, and so does what /save writes."""
    limit = length(7) - 1  # the eighth request is a token too long
    conversation = talked(limit, 7)
    assert conversation.left_out == 0
    request = conversation.question("Where do the ships go?")
    assert request.dropped == conversation.left_out
    assert request.dropped % 2 == 0
    assert len(request.token_ids) <= limit // 2
    turns = (14 - request.dropped) // 2
    assert length(turns + 1) > limit // 2  # no turn more than needed
    layout = conversation.layout
    kept = [{"role": "system", "content": "Be kind."}, *conversation.messages[request.dropped :]]
    assert request.token_ids == chat_ids(layout.text([*kept, request.messages[-1]]), layout.tokenizer)
    assert len(request.messages) == 15
    conversation.answered(request, "Home.", [])
    assert conversation.question("Why?").dropped == 0  # there is room again


def test_the_last_message_may_take_all_of_the_limit() -> None:
    limit = length(0)
    conversation = talked(limit, 1)
    request = conversation.question("Where do the ships go?")
    assert (request.dropped, len(request.token_ids)) == (2, limit)


def test_a_message_longer_than_the_limit_is_refused() -> None:
    """And changes nothing, whatever the policy."""
    for policy in ("drop", "refuse"):
        conversation = talked(length(1), 1, on_overflow=policy)
        before = list(conversation.messages)
        empty = Conversation(conversation.layout, conversation.limit, on_overflow=policy)
        line = rf"the message has \d\d\d+ tokens; {conversation.limit} fit beside an answer: shorten it"
        with pytest.raises(InputError, match=line):
            empty.question("Where do the ships go?" * 50)
        with pytest.raises(InputError, match=rf"\d\d\d+ tokens.* {conversation.limit} fit beside an answer"):
            conversation.question("Where do the ships go?" * 50)
        assert (conversation.messages, conversation.left_out) == (before, 0)


def test_a_conversation_that_may_not_be_shortened_is_refused() -> None:
    conversation = talked(length(3) - 1, 3, on_overflow="refuse")
    with pytest.raises(InputError, match=r"with this message the conversation has \d+ tokens; .*/undo or /clear"):
        conversation.question("Where do the ships go?")
    conversation.undo()
    assert conversation.question("Where do the ships go?").dropped == 0


def test_a_policy_that_is_none() -> None:
    with pytest.raises(InputError, match="on-overflow 'shift': choose one of: drop, refuse"):
        Conversation(chat_layout(None, sentencepiece()), 100, on_overflow="shift")


# Going back.


def test_undo_forgets_a_question_and_its_answer() -> None:
    conversation = talked(10_000, 2)
    assert [message["role"] for message in conversation.undo()] == ["user", "assistant"]
    assert len(conversation.messages) == 2
    conversation.undo()
    with pytest.raises(InputError, match="there is no message yet"):
        conversation.undo()
    with pytest.raises(InputError, match="there is no message yet"):
        conversation.question_again()


def test_undo_behind_what_was_left_out_brings_it_back() -> None:
    conversation = talked(length(7) - 1, 8)
    assert 0 < conversation.left_out < 14
    while len(conversation.messages) > conversation.left_out > 0:
        conversation.undo()
    assert conversation.left_out == 0
    assert conversation.question("Why?").dropped == 0


def test_the_last_question_can_be_asked_again() -> None:
    """With its answer or without, as a loaded conversation may end."""
    conversation = talked(10_000, 2)
    ids = conversation.question_again().token_ids
    assert len(conversation.messages) == 4  # until there is another answer
    conversation.replace("Be kind.", conversation.messages[:3])
    assert conversation.question_again().token_ids == ids
