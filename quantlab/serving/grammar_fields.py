"""The constraint that a request asks for, in whichever field it does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantlab.errors import InputError
from quantlab.generation.grammars import Grammar, json_schema_grammar, notated_grammar
from quantlab.serving.api_error import ApiError


def chosen_grammar(schemas: Mapping[str, Any], grammar: str | None) -> Grammar | None:
    """The one that is given, of schemas by their fields' names and a grammar's text.

    Raises:
        ApiError: 400, more than one, or one that nothing can meet.
    """
    given = [name for name, schema in schemas.items() if schema is not None] + ["grammar"] * bool(grammar)
    if len(given) > 1:
        raise ApiError(400, f"{' and '.join(given)}: one of them is enough", field=given[1])
    if not given:
        return None
    (name,) = given
    try:
        return notated_grammar(grammar or "", name) if name == "grammar" else json_schema_grammar(schemas[name], name)
    except InputError as error:
        raise ApiError(400, str(error), field=name) from None
