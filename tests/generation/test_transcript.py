"""Texts that grow by turns: their tokens are those of the whole, but for answers, which keep the tokens drawn."""

from __future__ import annotations

import pytest
from chat_templates import CASES, CHATML, byte_level, sentencepiece, spelt
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlab.checkpoint.chat_text import chat_ids
from quantlab.generation.chat_layout import chat_layout
from quantlab.generation.prompts import Message
from quantlab.generation.transcript import Transcript

WORDS = st.text(st.sampled_from("aeT .,\n19\u00e9\u4e2d\U0001f600'"), min_size=1, max_size=10).map(str.strip)


def said(*texts: str) -> list[Message]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(texts=st.lists(WORDS, min_size=3, max_size=5))
def test_a_conversation_has_the_tokens_that_training_gave_it(name: str, texts: list[str]) -> None:
    """Where a model draws what its tokenizer would have made of the answer, piece by piece gives the ids of the whole:
    those that `finetune` trains on.
    """
    case = CASES[name]
    layout = chat_layout(case.template, case.words())
    transcript = Transcript(layout.tokenizer)
    messages = said(*texts)
    for count in range(1, len(messages) + 1, 2):
        text = layout.text(messages[:count])
        asked = transcript.ids(text)
        assert asked == chat_ids(text, layout.tokenizer)
        answered = chat_ids(layout.text(messages[: count + 1], generation_prompt=False), layout.tokenizer)
        if answered[: len(asked)] != asked or count == len(messages):
            return  # a tokenizer that joins the prompt's end with the answer's beginning: nothing was drawn like that
        ends = [n for n, token in enumerate(answered) if n >= len(asked) and token in layout.tokenizer.eos]
        transcript.add_drawn(answered[len(asked) : ends[0] + 1])


def test_an_answer_keeps_the_tokens_that_were_drawn() -> None:
    layout = chat_layout(CHATML, byte_level())
    transcript = Transcript(layout.tokenizer)
    first = transcript.ids(layout.text(said("Hi")))
    drawn = spelt(byte_level(), "the end", "<|im_end|>")
    transcript.add_drawn(drawn)
    text = layout.text(said("Hi", "the end", "Bye"))
    second = transcript.ids(text)
    assert second[: len(first) + len(drawn)] == [*first, *drawn]
    assert byte_level().decode(second, skip_special_tokens=False) == text
    assert len(second) > len(chat_ids(text, byte_level()))  # which has longer pieces


@pytest.mark.parametrize(
    ("drawn", "said_then", "kept"),
    [
        ("the end", "the end", "the end"),  # stopped where no end token was drawn
        ("the end of", "the end", "the end"),  # tokens behind what was shown
        ("the ends", "the enemy", "the en"),
        ("the end", "another", ""),
    ],
)
def test_of_an_answer_that_was_cut_the_beginning_is_kept(drawn: str, said_then: str, kept: str) -> None:
    layout = chat_layout(CHATML, byte_level())
    transcript = Transcript(layout.tokenizer)
    first = transcript.ids(layout.text(said("Hi")))
    transcript.add_drawn(spelt(byte_level(), drawn))
    text = layout.text(said("Hi", said_then, "Bye"))
    ids = transcript.ids(text)
    expected = [*first, *spelt(byte_level(), kept)]
    rest = text.removeprefix(byte_level().decode(expected, skip_special_tokens=False))
    assert ids == [*expected, *byte_level().encode(rest, add_special_tokens=False)]


def test_half_a_character_is_no_beginning() -> None:
    layout = chat_layout(CHATML, byte_level())
    transcript = Transcript(layout.tokenizer)
    first = transcript.ids(layout.text(said("Hi")))
    smile = byte_level().encode("\U0001f600", add_special_tokens=False)
    assert len(smile) == 4
    transcript.add_drawn([*smile, *smile[:2]])
    ids = transcript.ids(layout.text(said("Hi", "\U0001f600", "Bye")))
    assert ids[len(first) : len(first) + 5] == [*smile, byte_level().backend.token_to_id("<|im_end|>")]


def test_earlier_texts_can_be_gone_back_to() -> None:
    """As /undo and /retry do: what was drawn before stays, what came behind is forgotten."""
    layout = chat_layout(None, sentencepiece())
    transcript = Transcript(layout.tokenizer)
    asked = transcript.ids(layout.text(said("Hi")))
    drawn = sentencepiece().encode("Hello there.", add_special_tokens=False)
    transcript.add_drawn(drawn)
    longer = transcript.ids(layout.text(said("Hi", "Hello there.", "Bye")))
    transcript.add_drawn(drawn)
    assert transcript.ids(layout.text(said("Hi", "Hello there.", "Bye"))) == longer
    other = transcript.ids(layout.text(said("Hi", "Hello there.", "Why?")))
    assert other[: len(asked) + len(drawn)] == [*asked, *drawn]
    assert transcript.ids(layout.text(said("Hi"))) == asked
    assert transcript.ids(layout.text(said("Ho"))) == chat_ids("User: Ho\nAssistant:", sentencepiece())
