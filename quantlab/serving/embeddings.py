"""Texts as vectors for `/v1/embeddings`."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from quantlab.retrieval.embedding import Embedder, load_embedder
from quantlab.serving.api_error import ApiError
from quantlab.serving.fields import RequestFields
from quantlab.serving.turns import Turn

MOST_TEXTS = 2048
NonEmpty = Annotated[str, Field(min_length=1)]


class EmbeddingRequest(RequestFields):
    """OpenAI's; token ids are another model's and cannot be read here."""

    input: NonEmpty | Annotated[list[NonEmpty], Field(min_length=1, max_length=MOST_TEXTS, fail_fast=True)]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None


class EmbeddingModel:
    """An embedding model by the name that clients know.

    Args:
        source: its folder or hub id.
    """

    def __init__(self, source: str, embedder: Embedder) -> None:
        self.source, self._embedder = source, embedder
        self.name = source.rstrip("/").rpartition("/")[2]

    def answer(self, request: EmbeddingRequest, turn: Turn) -> dict[str, Any]:
        """The response: vectors of unit length, of texts as documents are embedded.

        Raises:
            Cancelled: nobody waits for them any more.
            ApiError: 400, other dimensions than the model has.
        """
        texts = [request.input] if isinstance(request.input, str) else request.input
        vectors = self._embedder.documents(texts, lambda done: turn.check())
        if request.dimensions is not None and request.dimensions != vectors.shape[1]:
            raise ApiError(
                400,
                f"dimensions: {self.name} gives {vectors.shape[1]}, not {request.dimensions}",
                field="dimensions",
            )
        shown = _base64 if request.encoding_format == "base64" else _numbers
        data = [
            {"object": "embedding", "index": number, "embedding": shown(vector)}
            for number, vector in enumerate(vectors)
        ]
        tokens = sum(self._embedder.count(texts))
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"object": "list", "data": data, "model": self.name, "usage": usage}


def open_embedding_model(model: str, note: Callable[[str], None]) -> EmbeddingModel:
    """The embedding model of a folder or hub id; `note` takes a line about where it came from.

    Raises:
        InputError: see `load_embedder`.
    """
    return EmbeddingModel(model, load_embedder(model, note))


def _numbers(vector: np.ndarray) -> list[float]:
    numbers: list[float] = vector.tolist()
    return numbers


def _base64(vector: np.ndarray) -> str:
    """fp32, little-endian."""
    return base64.b64encode(np.ascontiguousarray(vector, "<f4").tobytes()).decode("ascii")
