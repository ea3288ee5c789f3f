"""`quantlab chat MODEL`."""

from __future__ import annotations

import json as json_module
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from quantlab.cli.chat_commands import ChatSession, load_conversation, open_documents
from quantlab.cli.chat_input import read_all
from quantlab.cli.chat_loop import converse
from quantlab.cli.chat_view import ChatView
from quantlab.cli.console import check_threads
from quantlab.cli.generation_options import (
    DraftModel,
    DraftTokens,
    FrequencyPenalty,
    LogitBias,
    MaxTokens,
    MinP,
    PenaltyWindow,
    PresencePenalty,
    PromptCacheFolder,
    PromptCacheSize,
    RepetitionPenalty,
    Seed,
    Speculation,
    Stop,
    Temperature,
    TopK,
    TopP,
    opened_prompt_cache,
    sampling_params,
)
from quantlab.cli.options import Adapters, Config, Engine, Json, Model, Threads, weighted_adapters
from quantlab.cli.passage_search import METHOD, PASSAGES, IndexPlace, PassageCount, SearchMethod

if TYPE_CHECKING:
    from quantlab.generation.chat_layout import ChatLayout


def chat(
    model: Model,
    system: Annotated[
        str | None, typer.Option("--system", "--system-prompt", help="What the model is to be.", show_default="none")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="A first message; - reads all of stdin.", show_default=False)
    ] = None,
    load: Annotated[
        Path | None, typer.Option("--load", help="Go on with a conversation that /save wrote.", show_default=False)
    ] = None,
    on_overflow: Annotated[
        str, typer.Option("--on-overflow", help="When the context is full: drop the oldest messages, or refuse.")
    ] = "drop",
    max_tokens: MaxTokens = 1024,
    temp: Temperature = 0.8,
    top_k: TopK = 40,
    top_p: TopP = 0.95,
    min_p: MinP = 0.05,
    repetition_penalty: RepetitionPenalty = 1.0,
    presence_penalty: PresencePenalty = 0.0,
    frequency_penalty: FrequencyPenalty = 0.0,
    penalty_window: PenaltyWindow = 0,
    logit_bias: LogitBias = None,
    stop: Stop = None,
    seed: Seed = 0,
    chat_template: Annotated[
        Path | None,
        typer.Option("--chat-template", help="A Jinja file instead of the model's own template.", show_default=False),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option("--context", help="Tokens of a conversation.", show_default="the model's, at most 4096"),
    ] = None,
    index: IndexPlace = None,
    passage_count: PassageCount = PASSAGES,
    search_method: SearchMethod = METHOD,
    speculation: Speculation = "auto",
    draft_model: DraftModel = None,
    num_draft_tokens: DraftTokens = 15,
    history: Annotated[
        Path | None, typer.Option("--history", help="Keep typed lines in this file.", show_default=False)
    ] = None,
    prompt_cache: PromptCacheFolder = None,
    prompt_cache_size: PromptCacheSize = "1GB",
    engine: Engine = "auto",
    adapter: Adapters = None,
    threads: Threads = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Talk with a model. Messages come from the terminal or, a line each, from a pipe; /help lists commands."""
    prompt, system = _checked("--prompt", prompt), _checked("--system", system)
    params = sampling_params(
        temp,
        top_k,
        top_p,
        min_p,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        penalty_window,
        logit_bias,
        seed,
    )
    adapters = weighted_adapters(adapter)
    check_threads(threads)
    from quantlab.checkpoint import load_tokenizer
    from quantlab.generation.chat import Chat
    from quantlab.generation.drafters import load_draft_model
    from quantlab.generation.engines import open_engine

    layout = _layout(model, chat_template)
    cache = opened_prompt_cache(prompt_cache, prompt_cache_size)
    opened = open_engine(model, engine, threads=threads, context=context, adapters=adapters, prompt_cache=cache)
    drafting = None if draft_model is None else load_draft_model(draft_model, model, load_tokenizer(model), threads)
    talk = Chat(
        opened,
        layout,
        system=system,
        params=params,
        max_tokens=max_tokens,
        stop=stop or (),
        on_overflow=on_overflow,
        speculation=speculation,
        draft_model=drafting,
        draft_tokens=num_draft_tokens,
    )
    session = ChatSession(talk, ChatView(json), model)
    _introduce(session)
    if index is not None:
        open_documents(session, index, passage_count, search_method)
    if load is not None:
        load_conversation(session, load)
    converse(session, read_all() if prompt == "-" else prompt, history)
    if json:
        _print_json(session)


def _checked(option: str, text: str | None) -> str | None:
    """None for nothing but white space."""
    from quantlab.errors import InputError

    try:
        (text or "").encode("utf-8")
    except UnicodeEncodeError:  # Python stands surrogates in for bytes that are no UTF-8
        raise InputError(f"{option} is not UTF-8 text") from None
    return text if text is not None and text.strip() else None


def _layout(model: str, template: Path | None) -> ChatLayout:
    from quantlab.checkpoint import load_tokenizer
    from quantlab.checkpoint.chat_text import chat_template, read_template
    from quantlab.generation.chat_layout import chat_layout

    given = read_template(template) if template is not None else None
    return chat_layout(chat_template(model) if given is None else given, load_tokenizer(model))


def _introduce(session: ChatSession) -> None:
    layout, view = session.chat.conversation.layout, session.view
    if sys.stderr.isatty():
        engine = session.chat.engine
        view.note(f"[{session.model}: {engine.name} engine, context of {engine.context} tokens; /help lists commands]")
    if layout.template is None:
        view.note("[the model has no chat template; it reads plain lines that begin with User: and Assistant:]")
    elif layout.folds_system and session.chat.conversation.system:
        view.note("[the model's chat template takes no system prompt; it leads the first message instead]")


def _print_json(session: ChatSession) -> None:
    from quantlab.generation.conversation_file import all_messages

    conversation, engine = session.chat.conversation, session.chat.engine
    messages = all_messages(conversation.system, conversation.messages)
    stats = asdict(session.chat.stats())
    found = {"messages": messages, "model": session.model, "engine": engine.name, "stats": stats}
    print(json_module.dumps({**found, "sources": session.sources}))
