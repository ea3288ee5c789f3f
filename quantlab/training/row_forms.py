"""The forms that a row of training data comes in, each told by its keys.

messages (OpenAI's), conversations (ShareGPT's), prompt and completion (TRL's: texts, or messages), instruction and
output (Alpaca's), text; or any two fields by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantlab.errors import InputError

Message = Mapping[str, Any]
Object = dict[str, Any]  # a row as JSON has it: unchecked

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
FORMS = "messages, conversations, prompt and completion, instruction and output, text"


@dataclass(frozen=True)
class Conversation:
    """Messages of role and content, as the model's chat template takes them; the assistant's are to be learned, from
    message number `learned_from` on. `tools` are descriptions of functions.
    """

    messages: tuple[Message, ...]
    learned_from: int = 0
    tools: tuple[Message, ...] | None = None


@dataclass(frozen=True)
class Completion:
    """A text that is given, and the one that is to follow it."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Text:
    """A text all of which is to be learned."""

    text: str


Content = Conversation | Completion | Text


@dataclass(frozen=True)
class RowForm:
    """How rows are to be read.

    `prompt_field` and `completion_field` name two fields; without them a row's keys tell its form. `prompt_layout` is
    put around each text that is a prompt, in the place of its `{prompt}`. `has_template` says whether the model has a
    chat template, which turns Alpaca's rows into conversations.
    """

    prompt_field: str | None = None
    completion_field: str | None = None
    prompt_layout: str | None = None
    has_template: bool = False

    def __post_init__(self) -> None:
        if self.prompt_layout is not None and "{prompt}" not in self.prompt_layout:
            raise InputError(f"prompt layout {self.prompt_layout!r}: holds no {{prompt}}")

    def content(self, row: object) -> Content:
        """What the row holds.

        Raises:
            InputError: it has no known form, or a field is missing, of a wrong type or empty; no file or line is named.
        """
        if not isinstance(row, dict):
            raise InputError("is no JSON object")
        if self.prompt_field is not None or self.completion_field is not None:
            return self._pair(row, self.prompt_field or "prompt", self.completion_field or "completion")
        if "messages" in row:
            return _conversation(_messages(row["messages"], "messages"), row)
        if "conversations" in row:
            return _conversation(_from_sharegpt(row["conversations"]), row)
        if "prompt" in row and "completion" in row:
            return self._prompt_and_completion(row)
        if "instruction" in row and "output" in row:
            return self._from_alpaca(row)
        if "text" in row:
            return Text(_filled(row, "text"))
        keys = ", ".join(sorted(map(str, row))[:6]) or "none"
        raise InputError(f"has no known form ({FORMS}); its keys: {keys}")

    def _pair(self, row: Object, prompt_name: str, completion_name: str) -> Completion:
        prompt = _string(row, prompt_name)
        if self.prompt_layout is not None:
            prompt = self.prompt_layout.replace("{prompt}", prompt)
        return Completion(prompt, _filled(row, completion_name))

    def _prompt_and_completion(self, row: Object) -> Content:
        lists = [isinstance(row[name], list) for name in ("prompt", "completion")]
        if not any(lists):
            return self._pair(row, "prompt", "completion")
        if not all(lists):
            raise InputError('"prompt" and "completion" must both be texts, or both lists of messages')
        prompt, completion = (_messages(row[name], name) for name in ("prompt", "completion"))
        return _conversation((*prompt, *completion), row, learned_from=len(prompt))

    def _from_alpaca(self, row: Object) -> Content:
        """A conversation where the model has a template for it; else headings between the parts."""
        instruction, answer = _filled(row, "instruction"), _filled(row, "output")
        extra, system = (_string(row, name) if row.get(name) is not None else "" for name in ("input", "system"))
        if self.has_template:
            question = f"{instruction}\n\n{extra}" if extra.strip() else instruction
            first = [{"role": "system", "content": system}] if system.strip() else []
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            return Conversation((*first, *turns))
        parts = [f"### Instruction:\n{instruction}"]
        if system.strip():
            parts.insert(0, system)
        if extra.strip():
            parts.append(f"### Input:\n{extra}")
        return Completion("\n\n".join([*parts, "### Response:\n"]), answer)


def _string(row: Object, name: str) -> str:
    if name not in row:
        raise InputError(f'has no "{name}"')
    value = row[name]
    if not isinstance(value, str):
        raise InputError(f'"{name}" is no text')
    return value


def _filled(row: Object, name: str) -> str:
    value = _string(row, name)
    if not value.strip():
        raise InputError(f'"{name}" is empty')
    return value


def _from_sharegpt(value: object) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise InputError('"conversations" is no list of messages')
    messages = []
    for number, turn in enumerate(value, start=1):
        if not isinstance(turn, dict) or not isinstance(turn.get("from"), str):
            raise InputError(f'message {number} of "conversations" has no "from"')
        role = SHAREGPT_ROLES.get(turn["from"], turn["from"])
        messages.append({"role": role, "content": turn.get("value")})
    return _messages(messages, "conversations")


def _messages(value: object, name: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise InputError(f'"{name}" is no list of messages')
    for number, message in enumerate(value, start=1):
        where = f'message {number} of "{name}"'
        if not isinstance(message, dict):
            raise InputError(f"{where} is no object")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise InputError(f"{where}: unknown role {str(role)[:30]!r} (known: {', '.join(ROLES)})")
        calls = role == "assistant" and bool(message.get("tool_calls"))
        if not isinstance(content, str) and not (calls and content is None):
            raise InputError(f"{where}: its content is no text")
    return tuple(value)


def _conversation(messages: tuple[Message, ...], row: Object, learned_from: int = 0) -> Conversation:
    answers = [m for m in messages[learned_from:] if m["role"] == "assistant"]
    if not answers:
        raise InputError("holds no turn of the assistant")
    if any(not (m["content"] or "").strip() and not m.get("tool_calls") for m in answers):
        raise InputError("holds an empty turn of the assistant")
    tools = row.get("tools") or None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise InputError('"tools" is no list of objects')
    return Conversation(messages, learned_from, None if tools is None else tuple(tools))
