"""The web application: which path leads where, and what stands before them all."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from http import HTTPStatus

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from quantlab.serving.api_error import ApiError
from quantlab.serving.chat_endpoint import chat_completions
from quantlab.serving.chat_request import ChatRequest
from quantlab.serving.completion_endpoint import completions
from quantlab.serving.completion_request import CompletionRequest
from quantlab.serving.description import description
from quantlab.serving.embedding_endpoint import embeddings
from quantlab.serving.embeddings import EmbeddingRequest
from quantlab.serving.fields import RequestFields
from quantlab.serving.guards import Guards
from quantlab.serving.information import health, metrics, models, page, properties
from quantlab.serving.request_log import RequestLog, notes_of
from quantlab.serving.service import Service
from quantlab.serving.vocabulary_endpoints import (
    DetokenizeRequest,
    TemplateRequest,
    TokenizeRequest,
    apply_template,
    detokenize,
    tokenize,
)

logger = logging.getLogger(__name__)
Endpoint = Callable[[Request, Service], Awaitable[ASGIApp]]


async def describe(request: Request, service: Service) -> JSONResponse:
    """What paths and fields there are."""
    return JSONResponse(description(ROUTES, has_key=service.settings.api_key is not None))


ROUTES: tuple[tuple[str, str, Endpoint, type[RequestFields] | None], ...] = (
    ("GET", "/", page, None),
    ("GET", "/health", health, None),
    ("GET", "/metrics", metrics, None),
    ("GET", "/openapi.json", describe, None),
    ("GET", "/props", properties, None),
    ("GET", "/v1/models", models, None),
    ("POST", "/v1/chat/completions", chat_completions, ChatRequest),
    ("POST", "/v1/completions", completions, CompletionRequest),
    ("POST", "/v1/embeddings", embeddings, EmbeddingRequest),
    ("POST", "/tokenize", tokenize, TokenizeRequest),
    ("POST", "/detokenize", detokenize, DetokenizeRequest),
    ("POST", "/apply-template", apply_template, TemplateRequest),
)


def make_app(service: Service, write: Callable[[str], None] | None = None) -> Starlette:
    """The application of a service.

    Args:
        write: takes the lines of the access log; by default they go to stderr.
    """
    settings = service.settings
    handlers = {ApiError: _refused, HTTPException: _http_error, Exception: _failed}
    middleware = [Middleware(RequestLog, metrics=service.metrics, write=write, log_texts=settings.log_texts)]
    if settings.cors_origin is not None:
        origins = [settings.cors_origin]
        middleware.append(Middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"]))
    middleware += [Middleware(ExceptionMiddleware, handlers=handlers), Middleware(Guards, settings=settings)]
    routes = [Route(path, _bound(endpoint, path, service), methods=[method]) for method, path, endpoint, _ in ROUTES]

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.turns.start()
        yield
        service.turns.stop()
        service.turns.cut()

    return Starlette(
        routes=routes, middleware=middleware, exception_handlers={HTTPException: _http_error}, lifespan=lifespan
    )


def _bound(endpoint: Endpoint, path: str, service: Service) -> Callable[[Request], Awaitable[ASGIApp]]:
    async def bound(request: Request) -> ASGIApp:
        notes_of(request.scope).path = path
        return await endpoint(request, service)

    return bound


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    notes_of(request.scope).error = error.message
    return JSONResponse(error.body(), error.status, error.headers)


async def _http_error(request: Request, error: Exception) -> Response:
    """Of the router: there is no such path, or not with this method."""
    assert isinstance(error, HTTPException)
    told = f"{request.method} {request.url.path[:200]}: {HTTPStatus(error.status_code).phrase.lower()}"
    return await _refused(request, ApiError(error.status_code, told, headers=error.headers))


async def _failed(request: Request, error: Exception) -> Response:
    """What nobody foresaw."""
    logger.error("a request failed", exc_info=error)
    return await _refused(request, ApiError(500, f"the server failed on this request: {type(error).__name__}"))
