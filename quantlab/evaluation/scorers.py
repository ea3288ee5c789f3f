"""Logits of whole windows, by the native engine or by torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from quantlab.errors import InputError
from quantlab.evaluation.windows import Window
from quantlab.generation.engines import open_engine
from quantlab.generation.native_engine import NativeEngine

if TYPE_CHECKING:
    from quantlab.generation.torch_engine import TorchEngine


class Scorer(ABC):
    """A loaded model that scores windows of up to `context` tokens.

    Attributes:
        name: the engine's.
        vocabulary: the number of token ids.
    """

    name: str
    vocabulary: int

    @abstractmethod
    def logits(self, windows: list[Window]) -> np.ndarray:
        """fp32 [windows, tokens, vocabulary] for windows of equal length."""


class NativeScorer(Scorer):
    """In float activations with a float cache: what the weights are worth, whatever an engine rounds on its way."""

    name = "native"

    def __init__(self, engine: NativeEngine) -> None:
        self._engine, self.vocabulary = engine, engine.vocabulary

    def logits(self, windows: list[Window]) -> np.ndarray:
        return np.stack([self._engine.logits_of(window.ids) for window in windows])


class TorchScorer(Scorer):
    """By transformers."""

    name = "torch"

    def __init__(self, engine: TorchEngine) -> None:
        self._model, self.vocabulary = engine.model, engine.vocabulary

    def logits(self, windows: list[Window]) -> np.ndarray:
        from quantlab.evaluation.forward import window_logits

        return window_logits(self._model, windows)


def open_scorer(model: str | Path, engine: str, context: int, threads: int | None = None) -> Scorer:
    """Load a model to score windows of `context` tokens; see `engines.open_engine`.

    Raises:
        InputError: the model cannot be loaded, or holds fewer tokens.
    """
    opened = open_engine(model, engine, threads=threads, context=context, kv="f32", activations="f32")
    if opened.context < context:
        raise InputError(f"context {context}: the model holds {opened.context} tokens; use --context")
    return NativeScorer(opened) if isinstance(opened, NativeEngine) else TorchScorer(opened)  # type: ignore[arg-type]
