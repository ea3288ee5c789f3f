"""`POST /v1/embeddings`."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp

from quantlab.serving.api_error import ApiError
from quantlab.serving.attendance import Attendance
from quantlab.serving.embeddings import EmbeddingRequest
from quantlab.serving.fields import read_fields
from quantlab.serving.request_body import read_json_body
from quantlab.serving.request_log import notes_of
from quantlab.serving.service import Service


async def embeddings(request: Request, service: Service) -> ASGIApp:
    """Embed texts, in turn with all that computes.

    Raises:
        ApiError: it is refused.
    """
    embedding = service.embedding
    if embedding is None:
        raise ApiError(404, "this server has no embedding model (quantlab serve --embedding-model ID)")
    asked = read_fields(EmbeddingRequest, await read_json_body(request, service.settings.max_body))
    if asked.model not in (None, "", embedding.name, embedding.source):
        told = f"no embedding model {asked.model[:200]!r} here; there is: {embedding.name}"
        raise ApiError(404, told, field="model", code="model_not_found")
    notes = notes_of(request.scope)
    notes.model = embedding.name
    body = await Attendance(request, service.turns, lambda turn: embedding.answer(asked, turn)).result()
    notes.prompt_tokens = body["usage"]["prompt_tokens"]
    return JSONResponse(body)
