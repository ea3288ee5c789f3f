"""Conversations as text: whole, and what ends an answer."""

from __future__ import annotations

import pytest
from chat_templates import ALPACA, BRACKETS, CASES, CHATML, HEADERS, THOUGHTS, TURNS, byte_level, sentencepiece

from quantlab import InputError
from quantlab.generation.chat_layout import chat_layout

SYSTEM = {"role": "system", "content": "Be kind."}
USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello."}


def test_plain_text_where_there_is_no_template() -> None:
    """Lines as base models know them from dialogues; an answer may begin with a line break of its own."""
    layout = chat_layout(None, byte_level())
    assert layout.text([USER]) == "User: Hi\nAssistant:"
    assert layout.text([SYSTEM, USER, ASSISTANT, USER]) == (
        "Be kind.\n\nUser: Hi\nAssistant: Hello.\nUser: Hi\nAssistant:"
    )
    assert layout.text([USER, ASSISTANT], generation_prompt=False) == "User: Hi\nAssistant: Hello."
    broken = {"role": "assistant", "content": "\nHello."}
    assert layout.text([USER, broken], generation_prompt=False) == "User: Hi\nAssistant:\nHello."
    assert layout.stop == ("\nUser:", "\nAssistant:")
    assert layout.tokenizer.eos == byte_level().eos


@pytest.mark.parametrize("name", CASES)
def test_the_token_that_ends_a_turn_ends_an_answer(name: str) -> None:
    """Whatever generation_config.json calls an end: models are trained to write this one."""
    case = CASES[name]
    words = case.words()
    before = words.eos
    layout = chat_layout(case.template, words)
    assert layout.tokenizer.eos == before | {words.backend.token_to_id(case.end)}
    assert layout.stop == ()
    assert words.eos == before


def test_text_ends_an_answer_where_no_token_does() -> None:
    layout = chat_layout(ALPACA, byte_level())
    assert layout.stop == ("\n\n### Instruction:",)
    assert layout.tokenizer.eos == byte_level().eos
    lines = chat_layout("{% for m in messages %}{{ m.content }}\n{% endfor %}", byte_level())
    assert lines.stop == ()  # a line break alone would end answers of several lines


@pytest.mark.parametrize("template", [BRACKETS, TURNS], ids=["by order of roles", "by name"])
def test_a_refused_system_prompt_leads_the_first_message(template: str) -> None:
    layout = chat_layout(template, sentencepiece())
    assert layout.folds_system
    assert "Be kind.\n\nHi" in layout.text([SYSTEM, USER, ASSISTANT, USER])
    assert layout.text([SYSTEM, USER]).count("Hi") == 1
    assert layout.text([USER]) == layout.text([{"role": "user", "content": "Hi"}])
    assert "Be kind." not in layout.text([USER])


def test_a_system_prompt_that_would_be_lost_leads_the_first_message_too() -> None:
    template = "{% for m in messages if m.role != 'system' %}{{ '<turn>' ~ m.content ~ '</turn>' }}{% endfor %}"
    layout = chat_layout(template, byte_level())
    assert layout.text([SYSTEM, USER]) == "<turn>Be kind.\n\nHi</turn>"


def test_templates_with_a_system_role_get_it() -> None:
    for template in (CHATML, HEADERS, THOUGHTS, ALPACA):
        assert not chat_layout(template, byte_level()).folds_system
    text = chat_layout(CHATML, byte_level()).text([SYSTEM, USER])
    assert text == "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("template", "line"),
    [
        ("{% for m in messages %}", "the model's chat template: is no template that Jinja reads: .*"),
        ("{{ raise_exception('never') }}", "this conversation: the model's chat template fails .*: never"),
        ("{{ messages[0].content.nothing() }}", "this conversation: the model's chat template fails .*nothing.*"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(template: str, line: str) -> None:
    with pytest.raises(InputError, match=line):
        chat_layout(template, byte_level())
