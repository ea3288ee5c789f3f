"""Conversations in files: ours come back whole, others' are read, and what is none is refused in one line."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from quantlab import InputError
from quantlab.generation.conversation_file import SavedConversation, read_conversation, write_conversation
from quantlab.generation.sampling import SamplingParams

MESSAGES = [{"role": "user", "content": "Hi \U0001f600"}, {"role": "assistant", "content": 'Hello,\n"you".'}]
PARAMS = SamplingParams(temperature=0.5, top_k=3, seed=(1 << 64) - 1, logit_bias={7: -math.inf, 2: 1.5})


@pytest.mark.parametrize(
    "saved",
    [
        SavedConversation("Be kind.", MESSAGES, "models/some", PARAMS, 99),
        SavedConversation(None, [], None, None, None),
    ],
    ids=["all", "nothing"],
)
def test_what_is_written_is_read(tmp_path: Path, saved: SavedConversation) -> None:
    file = tmp_path / "new" / "talk.json"
    write_conversation(file, saved)
    assert read_conversation(file) == saved
    write_conversation(file, saved)  # over itself
    assert [entry.name for entry in file.parent.iterdir()] == ["talk.json"]


def test_others_read_the_messages(tmp_path: Path) -> None:
    """In the form of trainers and servers, the system prompt among them."""
    write_conversation(tmp_path / "talk.json", SavedConversation("Be kind.", MESSAGES))
    content = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))
    assert content["messages"] == [{"role": "system", "content": "Be kind."}, *MESSAGES]


def test_a_file_that_is_no_conversation_is_not_replaced(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("Remember the milk.")
    with pytest.raises(InputError, match=r"notes.txt: is there already, and no conversation; choose another name"):
        write_conversation(file, SavedConversation(None, MESSAGES))
    assert file.read_text() == "Remember the milk."


SAMPLING = '{"messages": [], "sampling": %s}'


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ('{"messages": [{"role": "user", "content": NaN}]}', "not valid JSON"),
        ("[" * 10_000, "not valid JSON"),
        ("[]", r"no conversation; \{\"messages\": .* is expected"),
        ('{"messages": {}}', r"no conversation; .*"),
        ('{"messages": ["Hi"]}', "message 1: the role must be system, user or assistant"),
        ('{"messages": [{"role": "tool", "content": ""}]}', "message 1: the role must be system, user or assistant"),
        ('{"messages": [{"role": "user", "content": ["Hi"]}]}', "message 1: the content must be a text"),
        (
            '{"messages": [{"role": "user", "content": ""}, {"role": "system", "content": ""}]}',
            "a system prompt is expected at the beginning only",
        ),
        ('{"messages": [], "model": 3}', "model is no text"),
        ('{"messages": [], "max_tokens": 0}', "max_tokens is no whole number above 0"),
        ('{"messages": [], "max_tokens": true}', "max_tokens is no whole number above 0"),
        (SAMPLING % "3", "sampling is no object"),
        (SAMPLING % '{"heat": 3}', "sampling has unknown parameters: heat"),
        (SAMPLING % '{"temperature": "hot"}', "sampling holds what is no number"),
        (SAMPLING % f'{{"temperature": 1{"0" * 400}}}', "sampling holds a number beyond all bounds"),
        (SAMPLING % f'{{"logit_bias": {{"5": 1{"0" * 400}}}}}', "sampling holds a number beyond all bounds"),
        (SAMPLING % '{"temperature": true}', "sampling holds what is no number"),
        (SAMPLING % '{"top_k": 1.5}', "sampling holds what is no number"),
        (SAMPLING % '{"logit_bias": [3]}', "sampling holds what is no number"),
        (SAMPLING % '{"logit_bias": {"a": 3}}', "sampling holds what is no number"),
        (SAMPLING % '{"temperature": -1}', "temperature must be 0 or more"),
    ],
)
def test_what_is_no_conversation_is_refused(tmp_path: Path, content: str, fault: str) -> None:
    file = tmp_path / "talk.json"
    file.write_text(content)
    with pytest.raises(InputError, match=f"^{file}: {fault}$"):
        read_conversation(file)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.json: cannot be opened: No such file"):
        read_conversation(tmp_path / "absent.json")
    with pytest.raises(InputError, match="is a folder, pipe or device where a file should be"):
        read_conversation(tmp_path)
    (tmp_path / "talk.json").write_bytes(b'{"messages": ["\xff"]}')
    with pytest.raises(InputError, match=r"talk.json: not valid JSON"):
        read_conversation(tmp_path / "talk.json")
