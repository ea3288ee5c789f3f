"""Reciprocal rank fusion against a hand computation and LanceDB's own."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from lancedb.rerankers import RRFReranker

from quantlab.retrieval.fusion import reciprocal_ranks


def test_scores_by_hand():
    scores = reciprocal_ranks([["a", "b"], ["b", "c"]])
    assert scores == {"a": pytest.approx(1 / 61), "b": pytest.approx(1 / 62 + 1 / 61), "c": pytest.approx(1 / 62)}


def test_scores_are_lancedbs():
    generator = np.random.default_rng(0)
    one, other = generator.permutation(40)[:25], generator.permutation(40)[:25]
    tables = [pa.table({"_rowid": each, name: np.zeros(25)}) for each, name in ((one, "_distance"), (other, "_score"))]
    fused = RRFReranker(K=60).rerank_hybrid("", *tables).to_pydict()
    ours = reciprocal_ranks([one.tolist(), other.tolist()])
    theirs = dict(zip(fused["_rowid"], fused["_relevance_score"], strict=True))
    assert theirs == {key: pytest.approx(score, rel=1e-6) for key, score in ours.items()}
