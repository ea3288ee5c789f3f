"""Logits of a window's targets, by the native engine or by torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from quantlab.adapters.combine import Source as AdapterSource
from quantlab.errors import InputError
from quantlab.evaluation.windows import Window
from quantlab.generation.engine import Engine
from quantlab.generation.engines import open_engine
from quantlab.generation.native_engine import NativeEngine

if TYPE_CHECKING:
    from quantlab.generation.torch_engine import TorchEngine

MAX_LOGITS = 1 << 24  # numbers in one part of a window's logits: 64 MB in fp32
MIN_ROWS = 32


class Scorer(ABC):
    """A loaded model that scores windows of up to `context` tokens.

    Attributes:
        engine: the engine, whose sequence scoring replaces.
        name: the engine's.
        vocabulary: the number of token ids.
    """

    engine: Engine
    name: str
    vocabulary: int

    @abstractmethod
    def parts(self, window: Window) -> Iterator[np.ndarray]:
        """The logits that predict the window's targets, in order, some at a time: fp32 [<= rows, vocabulary].

        Raises:
            InputError: the window has an id that the model does not know.
        """

    @property
    def rows(self) -> int:
        """Targets in one part."""
        return max(MIN_ROWS, MAX_LOGITS // self.vocabulary)

    def _check(self, window: Window) -> None:
        if max(window.ids) >= self.vocabulary:
            raise InputError(f"token id {max(window.ids)} is outside the vocabulary of {self.vocabulary}")


class NativeScorer(Scorer):
    """By the native engine, whose results do not depend on how a window is cut into parts."""

    name = "native"

    def __init__(self, engine: NativeEngine) -> None:
        self.engine = self._engine = engine
        self.vocabulary = engine.vocabulary

    def parts(self, window: Window) -> Iterator[np.ndarray]:
        self._check(window)
        end = len(window.ids) - 1  # nothing is asked of the last token
        first = end - window.scored
        if first:
            self._engine.prefill(window.ids[:first])  # keeps what the window before began with
        else:
            self._engine.rewind(0)
        for start in range(first, end, self.rows):
            yield self._engine.append_all(window.ids[start : min(start + self.rows, end)])


class TorchScorer(Scorer):
    """By transformers, a whole window at once."""

    name = "torch"

    def __init__(self, engine: TorchEngine) -> None:
        self.engine, self._model, self.vocabulary = engine, engine.model, engine.vocabulary

    def parts(self, window: Window) -> Iterator[np.ndarray]:
        from quantlab.evaluation.forward import window_logits

        self._check(window)
        logits = window_logits(self._model, window)
        for start in range(0, window.scored, self.rows):
            yield logits[start : start + self.rows]


def open_scorer(
    model: str | Path,
    engine: str,
    context: int | None,
    threads: int | None = None,
    *,
    activations: str = "f32",
    kv: str | None = None,
    longest: int | None = None,
    adapters: Sequence[AdapterSource] | None = None,
) -> Scorer:
    """Load a model to score windows of `context` tokens, or without that of up to `longest`, as far as the model holds
    them; see `engines.open_engine`, also for `adapters`.

    In float activations with a float cache by default: what the weights are worth, whatever an engine rounds on its
    way. `kv` is by default "f32" with float activations and else "f16", as generation has it.

    Raises:
        InputError: the model or an adapter cannot be loaded, the model holds fewer tokens, or runs on torch, which
            rounds neither.
    """
    kv = kv or default_cache(activations)
    longest = context or longest
    opened = open_engine(
        model, engine, threads=threads, context=longest, kv=kv, activations=activations, adapters=adapters
    )
    if context is not None and opened.context < context:
        raise InputError(f"context {context}: the model holds {opened.context} tokens; use --context")
    if isinstance(opened, NativeEngine):
        return NativeScorer(opened)
    if (activations, kv) != ("f32", "f32"):
        asked = f"{activations} activations and a cache of {kv}"
        raise InputError(f"{model}: runs on torch, which computes in f32; {asked} need the native engine")
    return TorchScorer(opened)  # type: ignore[arg-type]


def default_cache(activations: str) -> str:
    """The key-value cache's element type where none is asked for."""
    return "f32" if activations == "f32" else "f16"
