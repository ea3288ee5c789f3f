"""The model that a server has: its engine, which may be let go of and loaded again, and all that is made from it once.

Of the thread that computes; what does not change (names, tokenizer, layout) may be read from any.
"""

from __future__ import annotations

import gc
import logging
import math
from pathlib import Path

from quantlab.checkpoint import Tokenizer, load_tokenizer
from quantlab.checkpoint.chat_text import chat_template
from quantlab.errors import InputError
from quantlab.generation.chat_layout import chat_layout
from quantlab.generation.drafters import check_speculation, load_draft_model
from quantlab.generation.engine import Engine
from quantlab.generation.engines import open_engine
from quantlab.generation.grammar_constraint import GrammarConstraint, GrammarTokens
from quantlab.generation.grammars import Grammar
from quantlab.generation.native_engine import NativeEngine
from quantlab.serving.api_error import ApiError
from quantlab.serving.settings import ModelSettings

logger = logging.getLogger(__name__)


class ModelHost:
    """See the module.

    Attributes:
        context: the most tokens of a sequence; engine_name: what reports call the engine.

    Raises:
        InputError: the model or an adapter cannot be loaded.
    """

    def __init__(self, settings: ModelSettings) -> None:
        check_speculation(settings.speculation, settings.draft_tokens, has_draft_model=settings.draft_model is not None)
        self.settings = settings
        self.tokenizer = load_tokenizer(settings.model)
        template = settings.chat_template or chat_template(settings.model)
        self.layout = chat_layout(template, self.tokenizer)
        self._grammar_tokens: dict[frozenset[int], GrammarTokens] = {}
        self._engine: Engine | None = None
        self._draft_model: NativeEngine | None = None
        self._adapter: str | None = None
        engine = self._load()
        self.context, self.engine_name = engine.context, engine.name
        self.vocabulary = engine.vocabulary
        self._longest_token = max(len(token.encode("utf-8")) for token in self.tokenizer.backend.get_vocab())
        self._check_adapters(engine)

    @property
    def is_loaded(self) -> bool:
        """Whether the weights are in memory."""
        return self._engine is not None

    @property
    def draft_model(self) -> NativeEngine | None:
        """The engine that drafts, if there is one; after `engine`."""
        return self._draft_model

    def adapter_of(self, model: str | None) -> str | None:
        """Which adapter a request's `model` names; None for the model itself.

        Raises:
            ApiError: 404, there is no model of that name.
        """
        settings = self.settings
        if model is None or model in ("", settings.name, settings.model, Path(settings.model).name):
            return None
        if model in settings.adapters:
            return model
        known = ", ".join([settings.name, *settings.adapters])
        raise ApiError(404, f"no model {model[:200]!r} here; there are: {known}", field="model", code="model_not_found")

    def engine(self, adapter: str | None) -> Engine:
        """The engine with that adapter, loaded if need be.

        Raises:
            ApiError: 503, it cannot be loaded any more.
        """
        try:
            engine = self._engine or self._load()
            if adapter != self._adapter:
                self._apply(engine, adapter)
        except InputError as error:
            self.release()
            raise ApiError(503, f"the model cannot be loaded: {error}", code="model_not_loaded") from None
        return engine

    def check_text(self, text: str) -> None:
        """Refuse a text that has more tokens than the context however it is divided: encoding it could take minutes.

        Raises:
            ApiError: 400.
        """
        least = math.ceil(len(text.encode("utf-8")) / self._longest_token)
        if least > self.context:
            raise too_long(f"at least {least}", self.context)

    def check_length(self, tokens: int) -> None:
        """Refuse a prompt that the context does not hold.

        Raises:
            ApiError: 400.
        """
        if tokens > self.context:
            raise too_long(str(tokens), self.context)

    def checked(self, token_ids: list[int]) -> list[int]:
        """The same ids, if the vocabulary has them all.

        Raises:
            InputError: it has not.
        """
        if outside := [token for token in token_ids if not 0 <= token < self.vocabulary]:
            raise InputError(f"token id {outside[0]} is outside the vocabulary of {self.vocabulary}")
        return token_ids

    def constraint(self, grammar: Grammar, tokenizer: Tokenizer) -> GrammarConstraint:
        """A constraint for one text, whose end tokens are the tokenizer's.

        Raises:
            InputError: see `GrammarConstraint`.
        """
        tokens = self._grammar_tokens.get(tokenizer.eos)
        if tokens is None:
            tokens = self._grammar_tokens[tokenizer.eos] = GrammarTokens(tokenizer, self.vocabulary)
        return GrammarConstraint(tokens, grammar)

    def keep(self) -> None:
        """Write what was computed to the prompt cache, if there is one."""
        if self._engine is not None:
            self._engine.keep()

    def release(self) -> None:
        """Let the engine go; the next request loads it."""
        if self._engine is not None:
            self._engine = self._draft_model = self._adapter = None
            gc.collect()
            logger.info("the model has been let go of")

    def _load(self) -> Engine:
        settings = self.settings
        engine = open_engine(
            settings.model,
            settings.engine,
            threads=settings.threads,
            context=settings.context,
            kv=settings.kv,
            activations=settings.activations,
            prompt_cache=settings.prompt_cache,
        )
        if settings.draft_model is not None:
            self._draft_model = load_draft_model(settings.draft_model, settings.model, self.tokenizer, settings.threads)
        self._engine, self._adapter = engine, None
        return engine

    def _check_adapters(self, engine: Engine) -> None:
        for name in self.settings.adapters:
            self._apply(engine, name)
        self._apply(engine, None)

    def _apply(self, engine: Engine, adapter: str | None) -> None:
        if adapter == self._adapter:
            return
        if not isinstance(engine, NativeEngine):
            raise InputError(f"adapter {adapter}: the {engine.name} engine does not exchange adapters; fuse it instead")
        engine.set_adapters([] if adapter is None else [self.settings.adapters[adapter]])
        self._adapter = adapter


def too_long(tokens: str, context: int) -> ApiError:
    """For a prompt of so many tokens."""
    return ApiError(400, f"the prompt has {tokens} tokens; the context holds {context}", code="context_length_exceeded")
