"""What an output may look like: a JSON schema, a regular expression, one of some texts, or a grammar."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantlab.checkpoint.json_file import parse_json
from quantlab.checkpoint.positioned import read_whole
from quantlab.errors import InputError, missing_extra

MAX_BYTES = 10_000_000  # of a schema's or grammar's file
COMPACT = {"whitespace_flexible": False}  # JSON without spaces: where they may come, a model may write nothing else


@dataclass(frozen=True)
class Grammar:
    """A grammar that llguidance takes; `source` is what errors call it."""

    text: str
    source: str


def json_schema_grammar(schema: Mapping[str, Any] | bool, source: str = "the JSON schema") -> Grammar:
    """JSON that a schema describes, written without spaces.

    Raises:
        InputError: llguidance is not installed, the schema is none or uses words that it does not know, or no value
            can meet it.
    """
    if schema is False:
        raise InputError(f"{source}: no output can meet it: the schema is false")
    whole = {} if schema is True else dict(schema)
    try:
        grammar = _matcher().grammar_from_json_schema(json.dumps(whole), defaults=COMPACT)
    except (ValueError, RecursionError) as error:
        told = "it is nested too deeply" if "recursion" in str(error) else str(error)
        raise InputError(f"{source}: {told}") from None
    return _checked(grammar, source)


def read_json_schema(path: Path) -> Grammar:
    """The same, from a file.

    Raises:
        InputError: it cannot be read or holds no JSON, or see `json_schema_grammar`.
    """
    content = read_whole(path, MAX_BYTES)
    try:
        schema = parse_json(content)
    except RecursionError:
        raise InputError(f"{path}: is nested too deeply") from None
    except ValueError as error:
        raise InputError(f"{path}: no JSON: {error}") from None
    if not isinstance(schema, (dict, bool)):
        raise InputError(f"{path}: a JSON schema is an object, true or false")
    return json_schema_grammar(schema, str(path))


def regex_grammar(pattern: str) -> Grammar:
    """Texts that a regular expression describes from beginning to end (Rust's: no look-around, no references).

    Raises:
        InputError: llguidance is not installed, or it is none.
    """
    return _checked(_matcher().grammar_from_regex(pattern), f"regular expression {pattern}")


def choice_grammar(choices: Sequence[str]) -> Grammar:
    """One of some texts.

    Raises:
        InputError: llguidance is not installed, there are none, or one is empty.
    """
    if not choices or "" in choices:
        raise InputError("choices: at least one is needed, and none may be empty")
    told = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)
    return _checked(_matcher().grammar_from_lark(f"start: {told}"), "choices")


def read_grammar(path: Path) -> Grammar:
    """The texts of a grammar in Lark's notation (llguidance's dialect of it), from a file.

    Raises:
        InputError: llguidance is not installed, or it cannot be read or is none.
    """
    try:
        text = read_whole(path, MAX_BYTES).decode("utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{path}: no UTF-8 text") from None
    return _checked(_matcher().grammar_from_lark(text), str(path))


def notated_grammar(text: str, source: str) -> Grammar:
    """The texts of a grammar in Lark's notation or in llama.cpp's GBNF, whichever it looks like.

    Raises:
        InputError: llguidance is not installed, or it is none.
    """
    matcher = _matcher()
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        lark = any_to_lark(text)
    except Exception as error:  # the converter raises whatever it stumbled over
        raise InputError(f"{source}: neither Lark's notation nor GBNF: {error}") from None
    return _checked(matcher.grammar_from_lark(lark), source)


def _matcher() -> Any:  # Any: llguidance may be missing
    try:
        from llguidance import LLMatcher
    except ImportError:
        raise missing_extra("llguidance", "constrain") from None
    return LLMatcher


def _checked(text: str, source: str) -> Grammar:
    if fault := _matcher().validate_grammar(text):
        raise InputError(f"{source}: {_one_fault(fault)}")
    return Grammar(text, source)


def _one_fault(message: str) -> str:
    """What is wrong, without the excerpt that points to it."""
    found = re.findall(r"^error: (.*)$", message, flags=re.MULTILINE)
    return str(found[-1]) if found else message.strip().splitlines()[0]
