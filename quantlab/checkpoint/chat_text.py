"""A conversation as the text that its model was trained on: the model's own chat template, rendered in a sandbox."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantlab.checkpoint.chat_templates import TEMPLATE, template_metadata
from quantlab.checkpoint.gguf_file import GgufFile
from quantlab.checkpoint.source import is_gguf, local_model
from quantlab.checkpoint.tokenizer import Tokenizer
from quantlab.documents import read_text
from quantlab.errors import InputError


def chat_template(model: str | Path) -> str | None:
    """The default chat template of a model folder, GGUF file or hub id; None if it has none.

    Raises:
        InputError: a file that may hold one is broken.
    """
    path = local_model(model)
    metadata = GgufFile(path).metadata if is_gguf(path) else template_metadata(path)
    template = metadata.get(TEMPLATE)
    return template if isinstance(template, str) else None


def read_template(file: Path) -> str:
    """A chat template from a file of its own.

    Raises:
        InputError: the file cannot be read, or is no template.
    """
    template = read_text(file)
    check_template(template, str(file))
    return template


def check_template(template: str, where: str = "the model's chat template") -> None:
    """Refuse a template that cannot be compiled.

    Raises:
        InputError: its syntax is wrong; the message begins with `where`.
    """
    from jinja2 import TemplateError

    from quantlab.checkpoint.chat_environment import compiled

    try:
        compiled(template)
    except TemplateError as error:
        raise InputError(f"{where}: is no template that Jinja reads: {error}") from None


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    where: str,
    *,
    generation_prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """The text of `messages` (role and content each), special tokens written out.

    Args:
        generation_prompt: end with what precedes the model's answer, as a request for one does.
        tools: descriptions of functions, for templates that show them to the model.

    Raises:
        InputError: the template refuses these messages, or fails on them; the message begins with `where`.
    """
    return _rendered(template, messages, tokenizer, where, generation_prompt, tools)[0]


def render_marked_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    where: str,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> tuple[str, list[tuple[int, int]]]:
    """The text of `messages`, and from where to where (in characters) the template's `{% generation %}` marks reach.

    Raises:
        InputError: as `render_chat`.
    """
    return _rendered(template, messages, tokenizer, where, False, tools)


def chat_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """Token ids of a rendered conversation, behind one start token where the model has one, whoever wrote it.

    Raises:
        InputError: as `Tokenizer.encode`.
    """
    ids = tokenizer.encode(text, add_special_tokens=False)
    return ids if tokenizer.bos is None or ids[:1] == [tokenizer.bos] else [tokenizer.bos, *ids]


def _rendered(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    where: str,
    generation_prompt: bool,
    tools: Sequence[Mapping[str, Any]] | None,
) -> tuple[str, list[tuple[int, int]]]:
    from jinja2 import TemplateError

    from quantlab.checkpoint.chat_environment import CLOSE, FAULTS, OPEN, compiled

    has_marks = "endgeneration" in template
    if has_marks and any(
        mark in str(value) for message in messages for value in message.values() for mark in OPEN + CLOSE
    ):
        raise InputError(f"{where}: holds U+FDD0 or U+FDD1, which are no characters")
    names = {"bos_token": _piece(tokenizer, tokenizer.bos), "eos_token": _piece(tokenizer, _least(tokenizer.eos))}
    try:
        text = compiled(template).render(
            messages=messages, tools=tools, documents=None, add_generation_prompt=generation_prompt, **names
        )
    except (TemplateError, *FAULTS) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{where}: the model's chat template fails on these messages: {reason}") from None
    return _without_marks(text, OPEN, CLOSE) if has_marks else (text, [])


def _without_marks(text: str, opening: str, closing: str) -> tuple[str, list[tuple[int, int]]]:
    kept, spans, length, start = [], [], 0, 0
    for part in re.split(f"([{opening}{closing}])", text):
        if part == opening:
            start = length
        elif part == closing:
            spans.append((start, length))
        else:
            kept.append(part)
            length += len(part)
    return "".join(kept), spans


def _least(ids: frozenset[int]) -> int | None:
    return min(ids, default=None)


def _piece(tokenizer: Tokenizer, token: int | None) -> str:
    return "" if token is None else tokenizer.backend.id_to_token(token) or ""
