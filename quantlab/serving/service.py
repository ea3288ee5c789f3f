"""What endpoints work with: the model, the turns at it, and what was measured."""

from __future__ import annotations

from dataclasses import dataclass

from quantlab.serving.documents import Documents
from quantlab.serving.embeddings import EmbeddingModel
from quantlab.serving.metrics import Metrics
from quantlab.serving.model_host import ModelHost
from quantlab.serving.settings import ServerSettings
from quantlab.serving.token_texts import TokenTexts
from quantlab.serving.turns import Turns


@dataclass(frozen=True)
class Service:
    """One server's.

    Attributes:
        started: seconds since 1970.
        documents: what `retrieval` searches, if anything.
        embedding: what `/v1/embeddings` asks, if anything.
    """

    host: ModelHost
    turns: Turns
    settings: ServerSettings
    metrics: Metrics
    token_texts: TokenTexts
    started: int
    documents: Documents | None = None
    embedding: EmbeddingModel | None = None
