"""Malformed requests by the thousand, the same ones each time, and what the server makes of them."""

from __future__ import annotations

import json
import random
import socket
from collections import Counter
from typing import Any

from served_model import Served

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/tokenize", "/detokenize", "/apply-template")
FIELDS = (
    "messages", "prompt", "input", "content", "tokens", "model", "max_tokens", "temperature", "top_p", "top_k", "min_p",
    "seed", "stop", "n", "logit_bias", "logprobs", "top_logprobs", "stream", "echo", "stream_options",
    "response_format", "grammar", "json_schema", "tools", "functions", "retrieval", "suffix", "best_of", "role", "type",
)  # fmt: skip
LEAVES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 0.5, 2**31, 2**63, 10**40, float("nan"), float("inf"), "", "user", "a", "\ud800",
    "\x00", "{", "\u202e", "a" * 20_000, "root ::= (", {}, [],
)  # fmt: skip
SOUND = {
    "messages": [{"role": "user", "content": "a"}], "prompt": "a", "input": "a", "content": "a", "tokens": [5],
    "max_tokens": 2,
}  # fmt: skip


def malformed(server: Served, count: int) -> dict[str, Any]:
    """Send `count` requests; how they were answered, and the server's memory before and after.

    The first half brings memory to its level (buffers that stay); the second must not add to it.
    """
    drawn = random.Random(0)
    sound = {"prompt": "The sea", "max_tokens": 8, "temperature": 0}
    expected = server.json("/v1/completions", sound)["choices"]
    statuses: Counter[str] = Counter()
    before = server.resident_bytes()
    for _ in range(count // 2):
        statuses[_one(server, drawn)] += 1
    middle = server.resident_bytes()
    for _ in range(count - count // 2):
        statuses[_one(server, drawn)] += 1
    after = server.resident_bytes()
    if server.json("/v1/completions", sound)["choices"] != expected:
        raise SystemExit("after all of them the answer is another one")
    if bad := [status for status in statuses if status.startswith("5")]:
        raise SystemExit(f"status {', '.join(bad)}")
    memory = {"before": before, "half_way": middle, "after": after}
    return {"requests": count, "statuses": dict(sorted(statuses.items())), "resident_bytes": memory}


def _one(server: Served, drawn: random.Random) -> str:
    """Send one, of one of four kinds; its status, or how it was broken off."""
    path, kind = drawn.choice(PATHS), drawn.random()
    if kind < 0.1:
        return _broken(server, drawn, path)
    if kind < 0.25:
        body = drawn.randbytes(drawn.randrange(300))
    elif kind < 0.3:
        body = drawn.choice((b"[", b'{"a":')) * drawn.randrange(1, 100_000)
    else:
        wrong = {drawn.choice(FIELDS): _value(drawn, 3) for _ in range(drawn.randrange(1, 4))}
        asked = {**SOUND, **wrong} if drawn.random() < 0.8 else wrong
        body = json.dumps(asked).encode("utf-8")
        if drawn.random() < 0.1:
            place = drawn.randrange(len(body))
            body = body[:place] + drawn.randbytes(1) + body[place + 1 :]
    return str(server.ask(path, body)[0])


def _value(drawn: random.Random, depth: int) -> Any:
    kind = drawn.random()
    if depth and kind < 0.2:
        return [_value(drawn, depth - 1) for _ in range(drawn.randrange(5))]
    if depth and kind < 0.4:
        return {drawn.choice(FIELDS): _value(drawn, depth - 1) for _ in range(drawn.randrange(5))}
    return drawn.choice(LEAVES)


def _broken(server: Served, drawn: random.Random, path: str) -> str:
    """A request that ends in its middle, or is none."""
    body = json.dumps(SOUND).encode()
    whole = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(whole[: drawn.randrange(len(whole))] if drawn.random() < 0.7 else drawn.randbytes(100))
    return "broken off"
