"""Conversations as JSON files: `{"messages": [{"role", "content"}, ...]}`, as trainers and servers read them.

The system prompt is the first message. Beside the messages, for whoever goes on: the model's name, how tokens were
drawn, and the most tokens of an answer.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from quantlab.checkpoint.atomic import atomic_file
from quantlab.checkpoint.json_file import parse_json
from quantlab.checkpoint.positioned import read_whole
from quantlab.errors import InputError
from quantlab.generation.prompts import Message
from quantlab.generation.sampling import SamplingParams

MAX_BYTES = 1 << 27


@dataclass(frozen=True)
class SavedConversation:
    """`messages` are without the system prompt. Files of others hold neither `model` nor parameters."""

    system: str | None
    messages: list[Message]
    model: str | None = None
    params: SamplingParams | None = None
    max_tokens: int | None = None


def all_messages(system: str | None, messages: Sequence[Message]) -> list[Message]:
    """The messages behind their system prompt."""
    return [*([{"role": "system", "content": system}] if system else []), *messages]


def write_conversation(path: Path, saved: SavedConversation) -> None:
    """Write a file that is complete or not there; an older one is replaced if it holds a conversation.

    Raises:
        InputError: the file is something else, or cannot be written.
    """
    if os.path.lexists(path):
        try:
            read_conversation(path)
        except InputError:
            raise InputError(f"{path}: is there already, and no conversation; choose another name") from None
    content: dict[str, Any] = {"messages": all_messages(saved.system, saved.messages), "model": saved.model}
    if saved.params is not None:
        content["sampling"] = _without_infinities(asdict(saved.params))
    content["max_tokens"] = saved.max_tokens
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_file(path, replace=True) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_conversation(path: Path) -> SavedConversation:
    """Read a conversation.

    Raises:
        InputError: the file cannot be read, or holds none.
    """
    data = read_whole(path, MAX_BYTES)
    try:
        content = parse_json(data)
    except (ValueError, RecursionError):
        raise InputError(f"{path}: not valid JSON") from None
    if not isinstance(content, dict) or not isinstance(content.get("messages"), list):
        raise InputError(f'{path}: no conversation; {{"messages": [{{"role": ..., "content": ...}}, ...]}} is expected')
    messages = [_message(item, number, path) for number, item in enumerate(content["messages"], 1)]
    system = messages.pop(0)["content"] if messages and messages[0]["role"] == "system" else None
    if any(message["role"] == "system" for message in messages):
        raise InputError(f"{path}: a system prompt is expected at the beginning only")
    model, max_tokens = content.get("model"), content.get("max_tokens")
    if model is not None and not isinstance(model, str):
        raise InputError(f"{path}: model is no text")
    if max_tokens is not None and (type(max_tokens) is not int or max_tokens < 1):
        raise InputError(f"{path}: max_tokens is no whole number above 0")
    return SavedConversation(system or None, messages, model, _params(content.get("sampling"), path), max_tokens)


def _message(item: object, number: int, path: Path) -> Message:
    role, text = (item.get("role"), item.get("content")) if isinstance(item, dict) else (None, None)
    if role not in ("system", "user", "assistant"):
        raise InputError(f"{path}: message {number}: the role must be system, user or assistant")
    if not isinstance(text, str):
        raise InputError(f"{path}: message {number}: the content must be a text")
    return {"role": role, "content": text}


def _params(value: object, path: Path) -> SamplingParams | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise InputError(f"{path}: sampling is no object")
    known = {field.name: field for field in fields(SamplingParams)}
    if unknown := sorted(set(value) - set(known)):
        raise InputError(f"{path}: sampling has unknown parameters: {', '.join(unknown)}")
    try:
        return SamplingParams(**{name: _parameter(name, item) for name, item in value.items()})
    except InputError as error:  # first: it is a ValueError too
        raise InputError(f"{path}: {error}") from None
    except (ValueError, TypeError):
        raise InputError(f"{path}: sampling holds what is no number") from None
    except OverflowError:
        raise InputError(f"{path}: sampling holds a number beyond all bounds") from None


def _parameter(name: str, value: Any) -> Any:  # Any: unchecked JSON
    """Of the type that the parameter has.

    Raises:
        ValueError: it is of another.
    """
    if name == "logit_bias":
        return {int(token): float(bias) for token, bias in dict(value).items()}
    wanted = type(getattr(SamplingParams(), name))
    if isinstance(value, bool) or not isinstance(value, int if wanted is int else (int, float)):
        raise ValueError(name)
    return wanted(value)


def _without_infinities(params: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no infinity: a forbidden token's bias becomes a text, which `float` reads."""
    biases = {str(token): bias if bias > -float("inf") else "-inf" for token, bias in params["logit_bias"].items()}
    return {**params, "logit_bias": biases}
