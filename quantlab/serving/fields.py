"""Requests as pydantic reads them: known fields by their types, others left alone, faults named by their path."""

from __future__ import annotations

import re
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from quantlab.serving.api_error import ApiError

Request = TypeVar("Request", bound="RequestFields")
# What pydantic puts into a path for a member of a union: names of types, not of fields.
_TYPE = re.compile(r"(str|int|float|bool|dict|list|tuple|constrained-\w+|nullable|[A-Z]\w*)(\[.*\])?|function-.*")


class RequestFields(BaseModel):
    """A request's body or a part of it. Clients send many fields that mean nothing here; they are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True)


def read_fields(kind: type[Request], body: Any) -> Request:
    """The request that a JSON value is.

    Raises:
        ApiError: 400, naming the first field that is wrong.
    """
    if not isinstance(body, dict):
        raise ApiError(400, "the body is no JSON object")
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_input=False, include_context=False)
        first = _path(faults[0]["loc"])
        paths = [path for fault in faults if (path := _path(fault["loc"])).startswith(first)]
        field = max(paths, key=len)  # the member of a union that came furthest
        # Of a union each member complains: together they say what is expected.
        messages = {fault["msg"] for fault in faults if _path(fault["loc"]) == field}
        told = " or ".join(sorted(_lower(message) for message in messages))
        raise ApiError(400, f"{field or 'the request'}: {told}", field=field or None) from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None


def _path(location: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in location if isinstance(part, int) or not _TYPE.fullmatch(part))


def _lower(message: str) -> str:
    return message.removeprefix("Value error, ").replace("Input should", "should", 1)
