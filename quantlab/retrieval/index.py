"""An index that questions are asked of: by meaning, by words, or by both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from quantlab.errors import InputError
from quantlab.retrieval.embedding import PROBE, Embedder, QuestionEmbedder, find_model, load_embedder, same_model
from quantlab.retrieval.fusion import reciprocal_ranks
from quantlab.retrieval.passages import Passage
from quantlab.retrieval.question_encoder import question_encoder
from quantlab.retrieval.store import Hit, Store, open_store

METHODS = ("hybrid", "vector", "keyword")
CANDIDATES = 50  # of either ranking at least; ten times the passages asked for where that is more


class Index:
    """An index open for questions.

    The embedding model loads with the first question that needs it; one by keywords alone does not.

    Args:
        store: where the passages lie.
        embedder: by default the one that the index was made with; given, it must have the same weights.
    """

    def __init__(self, store: Store, embedder: str | Embedder | None = None) -> None:
        self.store = store
        self._chosen = embedder if embedder is not None else store.settings.embedding_model
        self._embedder: QuestionEmbedder | None = None

    @property
    def complete(self) -> bool:
        """Whether the last run that changed the index has finished."""
        return self.store.complete

    def search(self, query: str, k: int = 4, *, method: str = "hybrid") -> list[Passage]:
        """The passages that answer `query` best, the best first; fewer than `k` if there are no more.

        Args:
            method: "vector" ranks by the cosine of meanings, "keyword" by BM25 of words, "hybrid" by both ranks.

        Raises:
            InputError: an empty query, a k below 1, an unknown method, or an index or model that cannot be used.
        """
        check_search(k, method)
        _check_query(query)
        count = min(max(CANDIDATES, 10 * k), self.store.chunks())
        if not count:  # nothing has been committed yet
            return []
        rankings = {
            "vector": self.store.nearest(self._vector(query), count) if method != "keyword" else [],
            "keyword": self.store.matching(query, count) if method != "vector" else [],
        }
        return _fused(rankings, method)[:k]

    def _vector(self, query: str) -> np.ndarray:
        if self._embedder is None:
            self._embedder = _question_embedder(self.store, self._chosen)
        return self._embedder.query(query)


def check_search(k: int, method: str) -> None:
    """Refuse what no search can do.

    Raises:
        InputError: a k below 1, or an unknown method.
    """
    if k < 1:
        raise InputError(f"{k} passages: at least 1 is needed")
    if method not in METHODS:
        raise InputError(f"search method {method}: choose one of: {', '.join(METHODS)}")


def open_index(
    uri: str | Path, *, embedding_model: str | Embedder | None = None, say: Callable[[str], None] | None = None
) -> Index:
    """The index in a folder or at a LanceDB URI.

    Args:
        embedding_model: where its embedding model is now, if it has moved: a folder or hub id.
        say: takes a note where the last indexing run has not finished.

    Raises:
        InputError: there is no index, or it cannot be read.
    """
    store = open_store(str(uri))
    if store is None:
        raise InputError(f"{uri}: holds no index; make one: quantlab index DOCS {uri}")
    if say is not None and not store.complete:
        say(f"{uri}: the last indexing run has not finished; what it did not reach is missing or old")
    return Index(store, embedding_model)


def chosen_embedder(store: Store, chosen: str | Embedder, say: Callable[[str], None] | None = None) -> Embedder:
    """Load an embedding model for an index.

    Raises:
        InputError: it cannot be loaded, or is another model than the index was made with.
    """
    embedder = load_embedder(chosen, say) if isinstance(chosen, str) else chosen
    if not _made(store, embedder):
        raise InputError(
            f"{store.uri}: was made with another embedding model ({store.settings.embedding_model}, "
            f"{store.settings.dimension} dimensions) than {embedder.name}; use that one, or embed everything anew "
            f"with: quantlab index --rebuild"
        )
    return embedder


def _question_embedder(store: Store, chosen: str | Embedder) -> QuestionEmbedder:
    """The same for questions alone: without torch where numpy gives the vectors that the index has.

    Raises:
        InputError: as `chosen_embedder`.
    """
    if not isinstance(chosen, str):
        return chosen_embedder(store, chosen)
    encoder = question_encoder(*find_model(chosen))
    return encoder if encoder is not None and _made(store, encoder) else chosen_embedder(store, chosen)


def _made(store: Store, embedder: QuestionEmbedder) -> bool:
    return same_model(embedder.documents([PROBE])[0], np.asarray(store.settings.probe, dtype=np.float32))


def _check_query(query: str) -> None:
    try:
        query.encode("utf-8")
    except UnicodeEncodeError:  # Python stands surrogates in for bytes that are no UTF-8
        raise InputError("the query is not UTF-8 text") from None
    if not query.strip():
        raise InputError("the query is empty")


def _fused(rankings: dict[str, list[Hit]], method: str) -> list[Passage]:
    """Passages by descending score; equal ones by source and position."""
    ranks = {name: {_key(hit): rank for rank, hit in enumerate(hits, 1)} for name, hits in rankings.items()}
    hits = {_key(hit): hit for found in rankings.values() for hit in found}
    if method == "hybrid":
        scores = reciprocal_ranks([[_key(hit) for hit in found] for found in rankings.values()])
    else:
        scores = {key: hit.score for key, hit in hits.items()}
    ordered = sorted(hits, key=lambda key: (-scores[key], key))
    return [
        Passage(
            hit.source,
            hit.text,
            scores[key],
            hit.place,
            hit.position,
            vector_rank=ranks["vector"].get(key),
            keyword_rank=ranks["keyword"].get(key),
        )
        for key in ordered
        for hit in (hits[key],)
    ]


def _key(hit: Hit) -> tuple[str, int]:
    return hit.source, hit.position
