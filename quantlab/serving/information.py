"""What a server tells about itself, and the page."""

from __future__ import annotations

from importlib.metadata import version

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from quantlab.serving.chat_page import chat_page
from quantlab.serving.service import Service


async def page(request: Request, service: Service) -> Response:
    """The page to talk on."""
    found = chat_page()
    return Response(found.content, headers=found.headers)


async def health(request: Request, service: Service) -> Response:
    """Whether requests are taken."""
    if service.turns.is_stopping:
        return JSONResponse({"status": "stopping"}, 503)
    return JSONResponse({"status": "ok"})


async def metrics(request: Request, service: Service) -> Response:
    """For Prometheus."""
    text, content_type = service.metrics.text()
    return Response(text, headers={"Content-Type": content_type})


async def models(request: Request, service: Service) -> Response:
    """The model, its adapters and the embedding model; `context_length` and the rest are no part of OpenAI's."""
    host, settings = service.host, service.host.settings
    shared = {"object": "model", "created": service.started, "owned_by": "quantlab"}
    told = {"context_length": host.context, "engine": host.engine_name, "has_index": service.documents is not None}
    data = [{"id": settings.name, **shared, "root": settings.name, "parent": None, **told}]
    data += [{"id": name, **shared, "root": name, "parent": settings.name, **told} for name in settings.adapters]
    if service.embedding is not None:
        data.append({"id": service.embedding.name, **shared})
    return JSONResponse({"object": "list", "data": data})


async def properties(request: Request, service: Service) -> Response:
    """llama-server's `/props`: what a request that says nothing gets, and how conversations are written."""
    host, settings = service.host, service.host.settings
    defaults = {name: value for name, value in vars(settings.params).items() if name != "logit_bias"}
    return JSONResponse(
        {
            "default_generation_settings": {"n_ctx": host.context, "n_predict": settings.max_tokens, **defaults},
            "total_slots": 1,
            "model_alias": settings.name,
            "chat_template": host.layout.template or "",
            "build_info": f"quantlab {version('quantlab')}",
            "is_sleeping": not host.is_loaded,
        }
    )
