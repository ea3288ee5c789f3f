"""An embedding model that a test can foretell: a text's vector counts its words, each in a place given by its hash."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence

import numpy as np

DIMENSION = 256


class TinyEmbedder:
    """Words and signs are tokens. `texts` keeps what was embedded, to be found or to find by."""

    def __init__(self, name: str = "tiny", tokens: int = 64, salt: str = "") -> None:
        self.name, self.tokens = name, tokens
        self.texts: list[str] = []
        self._salt = salt

    def count(self, texts: Sequence[str]) -> list[int]:
        return [len(re.findall(r"\w+|[^\w\s]", text)) for text in texts]

    def documents(self, texts: Sequence[str], done: Callable[[int], None] | None = None) -> np.ndarray:
        if done is not None:
            done(len(texts))
        return np.stack([self.query(text) for text in texts])

    def query(self, text: str) -> np.ndarray:
        self.texts.append(text)
        vector = np.full(DIMENSION, 1e-3, dtype=np.float32)
        for word in re.findall(r"\w+", text.lower()):
            vector[hashlib.sha256((self._salt + word).encode()).digest()[0]] += 1
        return vector / np.linalg.norm(vector)
