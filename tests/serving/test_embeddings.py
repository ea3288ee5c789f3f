"""`/v1/embeddings`: the embedder's vectors, as numbers or as bytes."""

from __future__ import annotations

import base64

import numpy as np
import openai
import pytest
from word_embedder import WordEmbedder

from quantlab.serving.embeddings import EmbeddingModel

TEXTS = ["The sea is wide.", "A castle", "A castle"]


@pytest.fixture(scope="module")
def embedding_server(start, described):
    with start(described(), embedding=EmbeddingModel("somewhere/words-v1", WordEmbedder())) as running:
        yield running


def test_the_client_gets_the_embedders_vectors(embedding_server) -> None:
    """The official client asks for base64 by itself; numbers are the same."""
    expected = WordEmbedder().documents(TEXTS)
    with openai.OpenAI(base_url=f"{embedding_server.url}/v1", api_key="none", max_retries=0) as client:
        reply = client.embeddings.create(model="words-v1", input=TEXTS)
        numbers = client.embeddings.create(model="words-v1", input=TEXTS, encoding_format="float")
        assert [model.id for model in client.models.list()] == ["tiny", "words-v1"]
    for found in (reply, numbers):
        assert np.array_equal(np.array([each.embedding for each in found.data], np.float32), expected)
        assert [each.index for each in found.data] == [0, 1, 2]
        assert found.usage.prompt_tokens == sum(len(text.split()) for text in TEXTS)


def test_bytes_are_little_endian_floats(embedding_server) -> None:
    """What base64 holds, without the client."""
    body = {"input": "The sea", "encoding_format": "base64", "model": "somewhere/words-v1"}
    reply = embedding_server.client.post("/v1/embeddings", body).json
    vector = np.frombuffer(base64.b64decode(reply["data"][0]["embedding"]), "<f4")
    assert np.array_equal(vector, WordEmbedder().query("The sea"))
    assert reply["model"] == "words-v1"


def test_wrong_requests_are_refused(embedding_server, running) -> None:
    """By field; and by a server without an embedding model."""
    cases = {"input": {"input": ""}, "input.1": {"input": ["a", 5]}, "dimensions": {"dimensions": 3}}
    for field, wrong in cases.items():
        reply = embedding_server.client.post("/v1/embeddings", {"input": "a", **wrong})
        assert (reply.status, reply.error["param"]) == (400, field)
    assert embedding_server.client.post("/v1/embeddings", {"input": [1, 2]}).status == 400
    assert embedding_server.client.post("/v1/embeddings", {"input": "a", "model": "tiny"}).status == 404
    reply = running.client.post("/v1/embeddings", {"input": "a"})
    assert reply.status == 404
    assert "--embedding-model" in reply.error["message"]
