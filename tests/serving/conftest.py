"""A real server on a port of this machine, its model a tiny random one."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from http_client import Client

from quantlab.serving.server import Server, bind, make_service
from quantlab.serving.service import Service
from quantlab.serving.settings import ModelSettings, ServerSettings


@dataclass
class Running:
    """A server that listens.

    Attributes:
        log: the lines of its access log, parsed.
    """

    service: Service
    port: int
    server: uvicorn.Server
    log: list[dict[str, Any]] = field(default_factory=list)

    def last_line(self, requests: int) -> dict[str, Any]:
        """Of the log, when so many requests have been told of; a line is written behind the last byte of an answer."""
        end = time.monotonic() + 60
        while len(self.log) < requests:
            assert time.monotonic() < end
            time.sleep(0.002)
        return self.log[-1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def client(self) -> Client:
        return Client(self.port)


@contextlib.contextmanager
def serving(model: ModelSettings, settings: ServerSettings | None = None, **parts: Any) -> Iterator[Running]:
    """A server while the block runs, in a thread."""
    settings = settings or ServerSettings(port=0)
    with bind(settings) as bound:
        service = make_service(model, settings, **parts)
        begun = threading.Event()
        lines: list[dict[str, Any]] = []
        server = Server(service, begun.set, lambda line: lines.append(json.loads(line)), heed_signals=False)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        try:
            assert begun.wait(60)
            yield Running(service, bound.getsockname()[1], server, lines)
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive()


@pytest.fixture(scope="session")
def start() -> Callable[..., contextlib.AbstractContextManager[Running]]:
    """See `serving`."""
    return serving


@pytest.fixture(scope="session")
def described(llama_model: Path) -> Callable[..., ModelSettings]:
    """A function (settings) -> those of the tiny Llama, served as "tiny"."""

    def described(**settings: Any) -> ModelSettings:
        return ModelSettings(model=str(llama_model), name="tiny", threads=1, **settings)

    return described


@pytest.fixture(scope="session")
def running(described: Callable[..., ModelSettings]) -> Iterator[Running]:
    """One server for all tests that leave it as it was."""
    with serving(described()) as found:
        yield found
