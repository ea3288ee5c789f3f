"""The forms of rows, told by their keys."""

from __future__ import annotations

import pytest

from quantlab import InputError
from quantlab.training.row_forms import Completion, Conversation, RowForm, Text

USER, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
TOOLS = [{"type": "function", "function": {"name": "now"}}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "now", "arguments": {}}}]}


@pytest.mark.parametrize(
    ("row", "content"),
    [
        ({"messages": [USER, ANSWER], "id": 7}, Conversation((USER, ANSWER))),
        ({"messages": [USER, CALL], "tools": TOOLS}, Conversation((USER, CALL), 0, tuple(TOOLS))),
        (
            {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
            Conversation((USER, ANSWER)),
        ),
        (
            {"conversations": [{"from": "system", "value": "S"}, {"from": "assistant", "value": "So."}]},
            Conversation(({"role": "system", "content": "S"}, ANSWER)),
        ),
        ({"prompt": "a", "completion": " b", "text": "c"}, Completion("a", " b")),
        ({"prompt": "", "completion": "b"}, Completion("", "b")),
        ({"prompt": [USER], "completion": [ANSWER]}, Conversation((USER, ANSWER), 1)),
        ({"text": "a\nb"}, Text("a\nb")),
        (
            {"instruction": "Add.", "input": "1 2", "output": "3"},
            Completion("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n", "3"),
        ),
        (
            {"instruction": "Add.", "input": "", "output": "3", "system": "Be brief."},
            Completion("Be brief.\n\n### Instruction:\nAdd.\n\n### Response:\n", "3"),
        ),
    ],
)
def test_keys_tell_the_form(row, content):
    assert RowForm().content(row) == content


def test_alpaca_rows_are_conversations_for_a_model_with_a_template():
    row = {"instruction": "Add.", "input": "1 2", "output": "3", "system": "Be brief."}
    system = {"role": "system", "content": "Be brief."}
    turns = ({"role": "user", "content": "Add.\n\n1 2"}, {"role": "assistant", "content": "3"})
    form = RowForm(has_template=True)
    assert form.content(row) == Conversation((system, *turns))
    assert form.content({**row, "system": None, "input": None}) == Conversation(
        ({"role": "user", "content": "Add."}, turns[1])
    )


def test_two_fields_by_name_and_a_layout():
    row = {"question": "1+1? {prompt}", "answer": "2", "messages": "not looked at"}
    form = RowForm("question", "answer", "Q: {prompt}\nA: ")
    assert form.content(row) == Completion("Q: 1+1? {prompt}\nA: ", "2")
    assert RowForm(completion_field="answer").content({"prompt": "p", "answer": "a"}) == Completion("p", "a")
    with pytest.raises(InputError, match=r"holds no \{prompt\}"):
        RowForm(prompt_layout="Q: ")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([1], "is no JSON object"),
        (None, "is no JSON object"),
        ({}, "its keys: none"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "its keys: chosen, prompt, rejected"),
        ({"prompt": "a", "completion": " \n"}, '"completion" is empty'),
        ({"prompt": 1, "completion": "b"}, '"prompt" is no text'),
        ({"prompt": [USER], "completion": "b"}, "both be texts, or both lists"),
        ({"prompt": [USER, ANSWER], "completion": [USER]}, "holds no turn of the assistant"),
        ({"text": ""}, '"text" is empty'),
        ({"text": ["a"]}, '"text" is no text'),
        ({"instruction": "a", "output": ""}, '"output" is empty'),
        ({"instruction": "a", "output": "b", "input": 3}, '"input" is no text'),
        ({"messages": []}, '"messages" is no list of messages'),
        ({"messages": {"role": "user"}}, '"messages" is no list of messages'),
        ({"messages": ["hi"]}, 'message 1 of "messages" is no object'),
        ({"messages": [USER, {"role": "bot", "content": "x"}]}, "message 2 of \"messages\": unknown role 'bot'"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "unknown role"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}, "its content is no text"),
        ({"messages": [USER]}, "holds no turn of the assistant"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, "holds an empty turn of the assistant"),
        ({"messages": [USER, ANSWER], "tools": "now"}, '"tools" is no list of objects'),
        ({"conversations": "hi"}, '"conversations" is no list of messages'),
        ({"conversations": [{"value": "hi"}]}, 'message 1 of "conversations" has no "from"'),
        ({"conversations": [{"from": "human"}]}, "its content is no text"),
    ],
)
def test_what_is_wrong_with_a_row(row, reason):
    with pytest.raises(InputError) as error:
        RowForm().content(row)
    assert reason in str(error.value)


def test_a_named_field_that_is_missing():
    with pytest.raises(InputError, match='has no "answer"'):
        RowForm("question", "answer").content({"question": "a", "completion": "b"})
