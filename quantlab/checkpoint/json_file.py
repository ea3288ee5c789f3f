"""Read JSON objects that somebody else wrote."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quantlab.checkpoint.positioned import read_whole
from quantlab.errors import InputError

SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # half a pair, or one of two
MAX_BYTES = 100_000_000  # the largest, an index of all tensors of a model of experts, take 10 MB


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Of a key that is there twice the last counts, as in transformers.

    Raises:
        InputError: missing, unreadable, too large, or something else, such as NaN, which JSON has not.
    """
    try:
        is_there = path.exists()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if not is_there:
        raise InputError(f"{path.parent}: holds no {path.name}; is this a model folder?")
    content = read_whole(path, MAX_BYTES)
    try:
        data = parse_json(content)
    except (ValueError, RecursionError):
        raise InputError(f"{path}: not valid JSON; download it again") from None
    if not isinstance(data, dict):
        raise InputError(f"{path}: not a JSON object")
    return data


def parse_json(content: bytes, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """The value of a JSON text; `pairs`, if given, makes objects of their keys and values.

    Raises:
        ValueError: it is none, or holds NaN, or half of a surrogate pair, which is no text that could be written again.
        RecursionError: it is nested too deeply.
    """
    value = json.loads(content.decode("utf-8"), parse_constant=_refuse, object_pairs_hook=pairs)
    if SURROGATE.search(content):
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def _refuse(word: str) -> None:
    raise ValueError(word)
