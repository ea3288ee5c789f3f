"""The sandbox that chat and prompt templates are rendered in, as transformers sets it up."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import StrictUndefined, Template, Undefined, meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

OPEN, CLOSE = "\ufdd0", "\ufdd1"  # around what {% generation %} marks; Unicode keeps both for such private use
# What expressions in a template may raise.
FAULTS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


class GenerationMarks(Extension):
    """`{% generation %}...{% endgeneration %}`: what the model is to write itself, put between OPEN and CLOSE."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Callable[[], str]) -> str:
        return f"{OPEN}{caller()}{CLOSE}"


@lru_cache(maxsize=8)  # a template renders each row of a file
def compiled(template: str, *, strict: bool = False) -> Template:
    """The template in a sandbox that keeps no block's line break.

    Args:
        strict: fail on what is not defined, which chat templates take as empty.

    Raises:
        TemplateError: its syntax is wrong.
    """
    return _environment(strict).from_string(template)


def variables_of(template: str) -> set[str]:
    """The names that a template expects to be given.

    Raises:
        TemplateError: its syntax is wrong.
    """
    environment = _environment(True)
    return meta.find_undeclared_variables(environment.parse(template)) - environment.globals.keys()


def block_names(template: str) -> list[str]:
    """The blocks of a template, in no order.

    Raises:
        TemplateError: its syntax is wrong.
    """
    return list(compiled(template, strict=True).blocks)


def _environment(strict: bool) -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[GenerationMarks, "jinja2.ext.loopcontrols"],
        undefined=StrictUndefined if strict else Undefined,
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _now
    return environment


def _to_json(  # Any: whatever a message holds
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _now(pattern: str) -> str:
    """Some templates tell the model today's date."""
    return datetime.now().astimezone().strftime(pattern)


def _refuse(message: str) -> None:
    raise ValueError(message)
