"""Whatever comes, the server refuses it in OpenAI's shape, or answers, and goes on answering."""

from __future__ import annotations

import json
import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/tokenize", "/detokenize", "/apply-template")
EXPECTED = {200, 400, 404, 413, 415}
FIELDS = (
    "messages", "prompt", "input", "content", "tokens", "model", "max_tokens", "max_completion_tokens", "temperature",
    "top_p", "top_k", "min_p", "seed", "stop", "n", "logit_bias", "logprobs", "top_logprobs", "stream", "echo",
    "stream_options", "response_format", "grammar", "json_schema", "tools", "retrieval", "repeat_last_n", "suffix",
)  # fmt: skip
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.sampled_from([-1, 0, 1, 2**31, 2**63, 2**64, 10**30]), st.floats(),
    st.text(max_size=20), st.sampled_from(["user", "\ud800", "\x00", "a" * 3000, "{", "tiny"]),
)  # fmt: skip
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(("role", *FIELDS)), inner, max_size=4),
    max_leaves=12,
)
SOUND = {
    "messages": [{"role": "user", "content": "a"}], "prompt": "a", "input": "a", "content": "a", "tokens": [5],
    "max_tokens": 2,
}  # fmt: skip
BODIES = st.one_of(
    st.dictionaries(st.sampled_from(FIELDS), VALUES, min_size=1, max_size=3).map(lambda wrong: {**SOUND, **wrong}),
    VALUES,
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(path=st.sampled_from(PATHS), body=BODIES)
def test_wrong_values_are_refused_or_ignored(running, path: str, body: object) -> None:
    """Values of any type in any field, NaN and halves of surrogate pairs among them."""
    if isinstance(body, dict) and isinstance(body.get("max_tokens"), int):
        body["max_tokens"] = min(body["max_tokens"], 3)
    reply = running.client.post(path, json.dumps(body).encode("utf-8"))
    assert reply.status in EXPECTED, reply.content
    if reply.status != 200:
        assert reply.error["message"].isprintable()
    assert running.client.get("/health").json == {"status": "ok"}


@settings(max_examples=50, deadline=None, derandomize=True)
@given(path=st.sampled_from(PATHS), body=st.binary(max_size=200))
def test_bytes_that_are_no_json_are_refused(running, path: str, body: bytes) -> None:
    """Bad UTF-8 too."""
    reply = running.client.post(path, body)
    assert reply.status in EXPECTED - {200, 413}
    assert reply.error["type"] in ("invalid_request_error", "not_found_error")


def chat(**fields: object) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": "a"}], **fields}).encode("utf-8")


HOSTILE = {
    "lists": b"[" * 100_000,
    "objects": b'{"a":' * 100_000,
    "digits": chat(max_tokens=0).replace(b"0", b"9" * 5000),
    "nan": chat(temperature=0).replace(b"0", b"NaN"),
    "infinity": chat(temperature=0).replace(b"0", b"Infinity"),
    "overflow": chat(temperature=0).replace(b"0", b"1e999"),
    "surrogate": chat(messages=[{"role": "user", "content": "\ud800"}]),
    "utf-8": chat().replace(b'"a"', b'"\xff"'),
    "mark": b"\xef\xbb\xbf" + chat(),
    "nothing": b"",
    "null": b"null",
    "text": b'"text"',
    "long": chat(messages=[{"role": "user", "content": "a" * 1_000_000}]),
    "many": chat(messages=[{"role": "user", "content": "a"}] * 4000),
    "too many": chat(messages=[{"role": "user", "content": "a"}] * 20_000),
    "wrong ones": chat(messages=[5] * 200_000),
    "long stop": chat(stop=["a" * 501]),
    "empty stop": chat(stop=[""]),
    "strange bias": chat(logit_bias={"9999": 1}),
    "many biases": chat(logit_bias={str(number): 1 for number in range(2000)}),
    "grammar": chat(grammar="root ::= ("),
    "long grammar": chat(grammar="start: " + " | ".join(f'"{number}x"' for number in range(10_000))),
    "schema": chat(json_schema={"type": "nothing"}),
    "image": chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]),
    "no question": chat(messages=[{"role": "assistant", "content": "a"}]),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bodies_get_400(running, name: str) -> None:
    """Deep nesting, numbers without end, NaN, texts that are none, prompts beyond the context, broken grammars."""
    reply = running.client.post("/v1/chat/completions", HOSTILE[name])
    assert reply.status == 400
    assert reply.error["type"] == "invalid_request_error"
    assert len(reply.error["message"]) < 3000


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize", "/v1/completions"])
def test_what_no_context_holds_is_not_even_encoded(running, path: str) -> None:
    """A megabyte would keep the tokenizer, and all that runs beside it, for seconds."""
    body = {"content": "a" * 1_000_000, "prompt": "a" * 1_000_000, "tokens": [5] * 100_000}
    reply = running.client.post(path, body)
    assert (reply.status, reply.error["code"]) == (400, "context_length_exceeded")


def nested(depth: int) -> dict:
    schema: dict = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize("depth", [100, 400, 900])
def test_deep_schemas_end_nothing(running, depth: int) -> None:
    """They may be too deep for the compiler of constraints, which must not take the server with it."""
    reply = running.client.chat(response_format={"type": "json_schema", "json_schema": {"schema": nested(depth)}})
    assert reply.status in (200, 400)
    assert running.client.chat().status == 200


def test_broken_connections_leave_no_trace(running) -> None:
    """Requests that end in the middle, that are no HTTP, and clients that close at once."""
    beginnings = [
        b"", b"GET", b"\x16\x03\x01\x02",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 20_000 + b"\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ]  # fmt: skip
    for beginning in beginnings:
        with socket.create_connection(("127.0.0.1", running.port), timeout=60) as connection:
            try:
                connection.sendall(beginning)
            except (BrokenPipeError, ConnectionResetError):
                continue
    assert running.client.chat().status == 200


def test_unknown_paths_and_methods(running) -> None:
    """In the same shape."""
    assert (running.client.get("/v1/nothing").status, running.client.get("/v1/completions").status) == (404, 405)
    assert running.client.get("/v1/completions").error["type"] == "invalid_request_error"
    assert running.client.post("/v1/completions", b"{}", Content_Encoding="gzip").status == 415
