"""A request's body as JSON, its size limited while it is read."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import ClientDisconnect, Request

from quantlab.checkpoint.json_file import parse_json
from quantlab.serving.api_error import ApiError

READING_SECONDS = 60.0  # that a client may take to send its request


async def read_json_body(request: Request, most: int) -> Any:
    """The JSON value.

    Args:
        most: bytes.

    Raises:
        ApiError: 413, too large; 408, too slow; 415, compressed; 400, no JSON, or JSON that is nested too deeply.
    """
    if request.headers.get("content-encoding", "identity") != "identity":
        raise ApiError(415, "compressed requests are not read; send it as it is")
    content = await _content(request, most)
    try:
        return parse_json(content)
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None
    except ValueError as error:
        told = "is no UTF-8 text" if isinstance(error, UnicodeError) else f"is no JSON: {error}"
        raise ApiError(400, f"the body {told}") from None


async def _content(request: Request, most: int) -> bytes:
    too_large = ApiError(413, f"the request has more than {most} bytes", code="request_too_large")
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdigit() and (len(length) > 18 or int(length) > most):
        raise too_large
    parts, size = [], 0
    try:
        async with asyncio.timeout(READING_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size > most:
                    raise too_large
                parts.append(part)
    except TimeoutError:
        raise ApiError(408, f"the request was not complete after {READING_SECONDS:.0f} s") from None
    except ClientDisconnect:
        raise ApiError(499, "the client has gone") from None
    return b"".join(parts)
