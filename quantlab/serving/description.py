"""The OpenAPI description of the server, from its routes and the fields that requests are read by."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.metadata import version
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

SCHEMAS = "#/components/schemas/"
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def description(
    routes: Iterable[tuple[str, str, Callable[..., Any], type[BaseModel] | None]], *, has_key: bool
) -> dict[str, Any]:
    """OpenAPI 3.1.

    Args:
        routes: method, path, what answers (its docstring's first line is shown), and the fields of its body.
        has_key: requests must carry a key.
    """
    table = list(routes)
    _, found = models_json_schema(
        [(kind, "validation") for _, _, _, kind in table if kind is not None], ref_template=f"{SCHEMAS}{{model}}"
    )
    paths: dict[str, Any] = {}
    for method, path, endpoint, kind in table:
        operation: dict[str, Any] = {"summary": (endpoint.__doc__ or "").splitlines()[0], "responses": _responses()}
        if kind is not None:
            schema = {"$ref": SCHEMAS + kind.__name__}
            operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
        paths.setdefault(path, {})[method.lower()] = operation
    components: dict[str, Any] = {"schemas": {**found.get("$defs", {}), "Error": ERROR}}
    described: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "quantlab serve", "version": version("quantlab")},
        "paths": paths,
        "components": components,
    }
    if has_key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        described["security"] = [{"key": []}]
    return described


def _responses() -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": f"{SCHEMAS}Error"}}}
    return {"200": {"description": "The answer."}, "default": {"description": "A refusal.", "content": content}}
