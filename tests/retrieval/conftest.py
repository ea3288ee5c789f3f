"""The real embedding model, from its package: once per run, since its libraries take seconds to load."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def minilm():
    """all-MiniLM-L6-v2 and the notes of its loading."""
    from quantlab.retrieval.embedding import DEFAULT_MODEL, load_embedder

    notes: list[str] = []
    return load_embedder(DEFAULT_MODEL, notes.append), notes
