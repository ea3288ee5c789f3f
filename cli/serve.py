"""`quantlab serve MODEL`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from quantlab.cli.console import check_threads
from quantlab.cli.generation_options import (
    DraftModel,
    DraftTokens,
    MaxTokens,
    MinP,
    PromptCacheFolder,
    PromptCacheSize,
    RepetitionPenalty,
    Seed,
    Speculation,
    Temperature,
    TopK,
    TopP,
    opened_prompt_cache,
    sampling_params,
)
from quantlab.cli.options import Activations, Config, Engine, Model, Threads
from quantlab.cli.passage_search import METHOD, PASSAGES, IndexPlace, PassageCount, SearchMethod

if TYPE_CHECKING:
    from quantlab.serving.settings import ServerSettings


def serve(
    model: Model,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen at; others than this machine's need a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="0: any that is free.")] = 8080,
    name: Annotated[
        str | None, typer.Option("--name", "--alias", help="What clients call the model.", show_default="its folder's")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", help="That requests must carry; also QUANTLAB_API_KEY.", show_default=False),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", metavar="[NAME=]DIR", help="That requests can choose as a model; may be repeated."),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option("--context", help="Tokens of a request.", show_default="the model's, at most 4096"),
    ] = None,
    chat_template: Annotated[
        Path | None,
        typer.Option("--chat-template", help="A Jinja file instead of the model's own template.", show_default=False),
    ] = None,
    queue: Annotated[int, typer.Option("--queue", help="Requests that may wait; others get 429.")] = 32,
    max_body: Annotated[str, typer.Option("--max-body", help="Bytes of a request.")] = "8MB",
    cors_origin: Annotated[
        str | None,
        typer.Option("--cors-origin", help="A site whose pages may ask, or *.", show_default="none but the server's"),
    ] = None,
    idle_unload: Annotated[
        float | None,
        typer.Option(
            "--idle-unload", metavar="SECONDS", help="Let go of the model when nobody asks.", show_default="never"
        ),
    ] = None,
    grace: Annotated[float, typer.Option("--grace", help="Seconds that the running answer has at the end.")] = 10.0,
    log_texts: Annotated[bool, typer.Option("--log-texts", help="Tell prompts and answers in the access log.")] = False,
    embedding_model: Annotated[
        str | None,
        typer.Option("--embedding-model", metavar="ID", help="For /v1/embeddings.", show_default="none"),
    ] = None,
    index: IndexPlace = None,
    passage_count: PassageCount = PASSAGES,
    search_method: SearchMethod = METHOD,
    max_tokens: MaxTokens = 1024,
    temp: Temperature = 0.8,
    top_k: TopK = 40,
    top_p: TopP = 0.95,
    min_p: MinP = 0.05,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = 0,
    speculation: Speculation = "auto",
    draft_model: DraftModel = None,
    num_draft_tokens: DraftTokens = 15,
    prompt_cache: PromptCacheFolder = None,
    prompt_cache_size: PromptCacheSize = "1GB",
    kv: Annotated[str, typer.Option("--kv", help="Elements of the cache: f16, f32 or q8_0 (native engine).")] = "f16",
    activations: Activations = "int8",
    engine: Engine = "auto",
    threads: Threads = None,
    config: Config = None,
) -> None:
    """Serve a model as OpenAI's API, and a page to talk on."""
    check_threads(threads)
    params = sampling_params(temp, top_k, top_p, min_p, repetition_penalty, 0.0, 0.0, 0, None, seed)
    _require_packages()
    from quantlab.checkpoint.byte_sizes import bytes_of
    from quantlab.checkpoint.chat_text import read_template
    from quantlab.serving.documents import open_documents
    from quantlab.serving.embeddings import open_embedding_model
    from quantlab.serving.server import bind, make_service, model_name
    from quantlab.serving.server import serve as serve_until_stopped
    from quantlab.serving.settings import ModelSettings, ServerSettings

    settings = ServerSettings(
        host=host,
        port=port,
        api_key=api_key or os.environ.get("QUANTLAB_API_KEY") or None,
        queue=queue,
        max_body=bytes_of(max_body, "--max-body"),
        cors_origin=cors_origin,
        idle_unload=idle_unload,
        grace=grace,
        log_texts=log_texts,
    )
    _check(settings)
    described = ModelSettings(
        model=model,
        name=name or model_name(model),
        adapters=_named_adapters(adapter or ()),
        engine=engine,
        threads=threads,
        context=context,
        kv=kv,
        activations=activations,
        chat_template=None if chat_template is None else read_template(chat_template),
        prompt_cache=opened_prompt_cache(prompt_cache, prompt_cache_size),
        speculation=speculation,
        draft_model=draft_model,
        draft_tokens=num_draft_tokens,
        params=params,
        max_tokens=max_tokens,
    )
    with bind(settings) as bound:
        documents = None if index is None else open_documents(index, passage_count, search_method, _note)
        embedding = None if embedding_model is None else open_embedding_model(embedding_model, _note)
        service = make_service(described, settings, documents=documents, embedding=embedding)
        serve_until_stopped(service, bound)


def _check(settings: ServerSettings) -> None:
    from quantlab.errors import InputError

    if settings.queue < 0:
        raise InputError(f"--queue {settings.queue}: 0 or more requests can wait")
    if settings.idle_unload is not None and not settings.idle_unload > 0:
        raise InputError(f"--idle-unload {settings.idle_unload}: more than 0 seconds are needed")
    if not settings.grace >= 0:
        raise InputError(f"--grace {settings.grace}: 0 or more seconds are needed")
    if settings.api_key is not None and not settings.api_key.isprintable():
        raise InputError("--api-key: holds what no header can carry")


def _named_adapters(given: Sequence[str]) -> dict[str, Path]:
    """Folders by name, which is the folder's own unless `NAME=` says another."""
    from quantlab.errors import InputError

    named: dict[str, Path] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not equals or Path(text).exists():
            name, folder = Path(text).resolve().name, text
        if not name or name in named:
            raise InputError(f"--adapter {text}: the name {name!r} is taken or empty; give another: NAME=DIR")
        named[name] = Path(folder)
    return named


def _note(line: str) -> None:
    print(f"note: {line}", file=sys.stderr)


def _require_packages() -> None:
    from importlib.util import find_spec

    from quantlab.errors import missing_extra

    for package in ("starlette", "uvicorn", "prometheus-client", "pydantic"):
        if find_spec(package.replace("-", "_")) is None:
            raise missing_extra(package, "serve")
