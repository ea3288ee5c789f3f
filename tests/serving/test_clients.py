"""Many clients at once, and clients that go away."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from quantlab.serving.settings import ModelSettings, ServerSettings
from quantlab.serving.turns import Turn

NO_END = {"logit_bias": {"2": -1000}}  # so that a text has as many tokens as it may


@contextlib.contextmanager
def occupied(running) -> Iterator[None]:
    """The engine has something else to do while the block runs."""
    begun, let = threading.Event(), threading.Event()

    def work(turn: Turn) -> None:
        begun.set()
        assert let.wait(60)

    loop = asyncio.new_event_loop()
    running.service.turns.ask(work, loop)
    assert begun.wait(60)
    try:
        yield
    finally:
        let.set()
        wait_until(lambda: running.service.turns.waiting == 0)
        loop.close()


def wait_until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_twenty_clients_are_served_in_the_order_they_came(start, described) -> None:
    """Each asks for one token more than the one before it; the log has them in order, and none is missing."""
    with start(described(), ServerSettings(port=0, queue=20)) as running, ThreadPoolExecutor(20) as pool:
        turns, asked = running.service.turns, []
        with occupied(running):
            for number in range(20):
                asked.append(pool.submit(running.client.chat, max_tokens=number + 1, **NO_END))
                wait_until(lambda waiting=number + 1: turns.waiting == waiting)
        assert [reply.result().status for reply in asked] == [200] * 20
        wait_until(lambda: len(running.log) == 20)
        assert [line["completion_tokens"] for line in running.log] == list(range(1, 21))


def test_too_many_clients_are_told_when_to_come_back(start, described) -> None:
    """Five wait, fifteen get 429 with Retry-After; the five get their answers, and then the queue is free again."""
    with start(described(), ServerSettings(port=0, queue=5)) as running, ThreadPoolExecutor(20) as pool:
        with occupied(running):
            asked = [pool.submit(running.client.chat, temperature=0) for _ in range(20)]
            wait_until(lambda: sum(reply.done() for reply in asked) == 15)
            refused = [reply.result() for reply in asked if reply.done()]
            for reply in refused:
                assert (reply.status, reply.error["code"]) == (429, "queue_full")
                assert int(reply.headers["retry-after"]) >= 1
        answers = [reply.result() for reply in asked if reply.result().status == 200]
        assert len(answers) == 5
        assert len({reply.json["choices"][0]["message"]["content"] for reply in answers}) == 1
        assert running.client.chat().status == 200


@pytest.fixture(scope="module")
def long_model(make_model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama that can write for long."""
    return make_model(tmp_path_factory.mktemp("long"), "llama", max_position_embeddings=16384)


def send(port: int, body: dict) -> socket.socket:
    """A chat request on a socket, which is left open."""
    content = json.dumps({"messages": [{"role": "user", "content": "On and on"}], **body}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", port), timeout=60)
    connection.sendall(head.encode() + content)
    return connection


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_the_engine(start, long_model: Path, stream: bool) -> None:
    """Its text ends long before it would have; who waits behind it is served, who went while waiting is not."""
    model = ModelSettings(model=str(long_model), name="long", threads=1, context=16384)
    endless = {"max_tokens": 16000, "stream": stream, **NO_END}
    with start(model) as running, ThreadPoolExecutor(1) as pool:
        turns, first = running.service.turns, send(running.port, endless)
        wait_until(lambda: turns.is_running)
        if stream:
            assert first.recv(15) == b"HTTP/1.1 200 OK"
        second = send(running.port, endless)
        wait_until(lambda: turns.waiting == 1)
        third = pool.submit(running.client.chat, max_tokens=2, **NO_END)
        wait_until(lambda: turns.waiting == 2)
        second.close()
        wait_until(lambda: turns.waiting == 1)
        engine = running.service.host.engine(None)
        first.close()
        wait_until(lambda: not turns.waiting)
        assert engine.position < 16000
        assert third.result().status == 200
        wait_until(lambda: len(running.log) == 3)
        (answered,) = [line for line in running.log if "error" not in line]
        assert answered["completion_tokens"] == 2
        waited, ran = sorted((line for line in running.log if "error" in line), key=lambda line: "run_ms" in line)
        assert waited["error"] == ran["error"] == "the client has gone"
        assert "run_ms" not in waited
        assert ran["status"] == (200 if stream else 499)
