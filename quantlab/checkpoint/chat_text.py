"""A conversation as the text that its model was trained on: the model's own chat template, rendered in a sandbox."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantlab.checkpoint.chat_templates import TEMPLATE, template_metadata
from quantlab.checkpoint.gguf_file import GgufFile
from quantlab.checkpoint.source import is_gguf, local_model
from quantlab.checkpoint.tokenizer import Tokenizer
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


def render_chat(template: str, messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, where: str) -> str:
    """The text of `messages` (role and content each), special tokens written out.

    The environment is the one that transformers renders templates in: a sandbox that keeps no block's line break.

    Raises:
        InputError: the template refuses these messages, or fails on them; the message begins with `where`.
    """
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    names = {"bos_token": _piece(tokenizer, tokenizer.bos), "eos_token": _piece(tokenizer, _least(tokenizer.eos))}
    try:
        return environment.from_string(template).render(messages=messages, add_generation_prompt=False, **names)
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{where}: the model's chat template fails on these messages: {reason}") from None


def _to_json(value: Any, indent: int | None = None) -> str:  # Any: whatever a message holds
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> None:
    raise ValueError(message)


def _least(ids: frozenset[int]) -> int | None:
    return min(ids, default=None)


def _piece(tokenizer: Tokenizer, token: int | None) -> str:
    return "" if token is None else tokenizer.backend.id_to_token(token) or ""
