"""What a server is started with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from quantlab.generation.drafters import DRAFT_TOKENS
from quantlab.generation.prompt_cache import PromptCache
from quantlab.generation.sampling import SamplingParams

MEGABYTE = 1_000_000


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The model and how it computes; see `open_engine` and `complete`.

    Attributes:
        name: what clients call it.
        adapters: folders by the names that choose them.
        chat_template: a template's text instead of the model's own.
        max_tokens: of an answer whose request does not say.
    """

    model: str
    name: str
    adapters: Mapping[str, Path] = field(default_factory=dict)
    engine: str = "auto"
    threads: int | None = None
    context: int | None = None
    kv: str = "f16"
    activations: str = "int8"
    chat_template: str | None = None
    prompt_cache: PromptCache | None = None
    speculation: str = "auto"
    draft_model: str | None = None
    draft_tokens: int = DRAFT_TOKENS
    params: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int = 1024


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Who may ask, and how much.

    Attributes:
        port: 0 for any that is free.
        api_key: that requests must carry, if any.
        queue: requests that may wait.
        max_body: bytes of a request.
        cors_origin: a site whose pages may ask, such as "https://example.org"; None: only the server's own.
        idle_unload: seconds without a request after which the model is let go of; None: never.
        grace: seconds that the running answer has when the server is told to stop.
        log_texts: tell prompts and answers in the access log.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    api_key: str | None = None
    queue: int = 32
    max_body: int = 8 * MEGABYTE
    cors_origin: str | None = None
    idle_unload: float | None = None
    grace: float = 10.0
    log_texts: bool = False
