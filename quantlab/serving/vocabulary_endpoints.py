"""llama-server's `/tokenize`, `/detokenize` and `/apply-template`: what the model makes of texts before it computes."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from quantlab.errors import InputError
from quantlab.serving.api_error import ApiError
from quantlab.serving.chat_endpoint import chat_text
from quantlab.serving.chat_request import Messages, written_messages
from quantlab.serving.fields import RequestFields, read_fields
from quantlab.serving.request_body import read_json_body
from quantlab.serving.service import Service


class TokenizeRequest(RequestFields):
    """A text; with the start token if wanted, and with the pieces that tokens stand for."""

    content: str
    add_special: bool = False
    with_pieces: bool = False


class DetokenizeRequest(RequestFields):
    """Token ids."""

    tokens: Annotated[list[int], Field(fail_fast=True)]


class TemplateRequest(RequestFields):
    """A conversation."""

    messages: Messages


async def tokenize(request: Request, service: Service) -> Response:
    """Token ids of a text that the context may hold: the tokenizer lets nothing else run meanwhile.

    Raises:
        ApiError: it is refused.
    """
    asked = read_fields(TokenizeRequest, await read_json_body(request, service.settings.max_body))
    service.host.check_text(asked.content)
    try:
        ids = service.host.tokenizer.encode(asked.content, add_special_tokens=asked.add_special)
    except InputError as error:
        raise ApiError(400, str(error), field="content") from None
    tokens: list[Any] = list(ids)
    if asked.with_pieces:
        tokens = [{"id": token, "piece": service.token_texts.text_of(token)} for token in ids]
    return JSONResponse({"tokens": tokens})


async def detokenize(request: Request, service: Service) -> Response:
    """The text of token ids.

    Raises:
        ApiError: it is refused.
    """
    asked = read_fields(DetokenizeRequest, await read_json_body(request, service.settings.max_body))
    service.host.check_length(len(asked.tokens))
    try:
        ids = service.host.checked(asked.tokens)
    except InputError as error:
        raise ApiError(400, str(error), field="tokens") from None
    return JSONResponse({"content": service.host.tokenizer.decode(ids)})


async def apply_template(request: Request, service: Service) -> Response:
    """A conversation as the text that asks for an answer.

    Raises:
        ApiError: it is refused.
    """
    asked = read_fields(TemplateRequest, await read_json_body(request, service.settings.max_body))
    try:
        return JSONResponse({"prompt": chat_text(service.host, written_messages(asked.messages))})
    except InputError as error:
        raise ApiError(400, str(error), field="messages") from None
