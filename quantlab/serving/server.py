"""The server as a process: its address, its start, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import uvicorn

from quantlab.errors import InputError
from quantlab.serving.app import make_app
from quantlab.serving.documents import Documents
from quantlab.serving.embeddings import EmbeddingModel
from quantlab.serving.guards import is_loopback
from quantlab.serving.metrics import Metrics
from quantlab.serving.model_host import ModelHost
from quantlab.serving.service import Service
from quantlab.serving.settings import ModelSettings, ServerSettings
from quantlab.serving.token_texts import TokenTexts
from quantlab.serving.turns import Turns

MOST_CONNECTIONS = 512
MOST_HEADER_BYTES = 64_000
CLOSING_SECONDS = 2.0  # for connections, when no answer is under way any more


def bind(settings: ServerSettings) -> socket.socket:
    """The socket of the address, which nobody can reach before the server listens.

    Raises:
        InputError: it is in use, or is none of this machine; or it can be reached from elsewhere and there is no key.
    """
    host, port = settings.host, settings.port
    if not is_loopback(host) and settings.api_key is None:
        raise InputError(
            f"--host {host}: whoever reaches this machine could use the server; give it an --api-key "
            "(or QUANTLAB_API_KEY), or stay with --host 127.0.0.1"
        )
    if not 0 <= port < 1 << 16:
        raise InputError(f"--port {port}: ports are 0 (any that is free) to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no name of a host"
        way_out = "choose another --port, 0 for any that is free"
        raise InputError(f"{host}:{port}: cannot be served: {str(reason).lower()}; {way_out}") from None
    return bound


def make_service(
    model: ModelSettings,
    settings: ServerSettings,
    *,
    documents: Documents | None = None,
    embedding: EmbeddingModel | None = None,
) -> Service:
    """Load the model.

    Raises:
        InputError: see `ModelHost`.
    """
    host = ModelHost(model)
    turns = Turns(settings.queue, host.release, settings.idle_unload, host.keep)
    metrics = Metrics()
    metrics.watch("queue_length", "Requests that wait.", lambda: turns.waiting)
    metrics.watch("running", "Requests that are worked on.", lambda: turns.is_running)
    metrics.watch("model_loaded", "Whether the weights are in memory.", lambda: host.is_loaded)
    return Service(
        host=host,
        turns=turns,
        settings=settings,
        metrics=metrics,
        token_texts=TokenTexts(host.tokenizer),
        started=int(time.time()),
        documents=documents,
        embedding=embedding,
    )


class Server(uvicorn.Server):
    """Serves one service.

    Args:
        on_start: called when requests can come.
        write: takes the lines of the access log.
        heed_signals: end by SIGINT and SIGTERM, which only a main thread can.
    """

    def __init__(
        self,
        service: Service,
        on_start: Callable[[], None] | None = None,
        write: Callable[[str], None] | None = None,
        *,
        heed_signals: bool = True,
    ) -> None:
        config = uvicorn.Config(
            make_app(service, write),
            http="h11",
            ws="none",
            loop="asyncio",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            limit_concurrency=MOST_CONNECTIONS,
            h11_max_incomplete_event_size=MOST_HEADER_BYTES,
            timeout_graceful_shutdown=int(CLOSING_SECONDS),
        )
        super().__init__(config)
        self._service, self._on_start, self._heeds_signals = service, on_start, heed_signals
        self._ending: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and self._on_start is not None:
            self._on_start()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Ours: the first signal lets the running answer end within the grace, the second cuts it."""
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGINT, signal.SIGTERM) if self._heeds_signals else ()
        for number in numbers:
            loop.add_signal_handler(number, self.end)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    def end(self) -> None:
        """Take no more requests, let the running one end, then leave; called again: cut it."""
        turns = self._service.turns
        if self._ending is not None:
            turns.cut()
            return
        turns.stop()
        self._ending = asyncio.get_running_loop().create_task(self._end())

    async def _end(self) -> None:
        turns, deadline = self._service.turns, time.monotonic() + self._service.settings.grace
        while turns.is_running:
            if time.monotonic() >= deadline:
                turns.cut()
            await asyncio.sleep(0.02)
        self.should_exit = True


def serve(service: Service, bound: socket.socket) -> None:
    """Serve until a signal says stop."""

    def tell() -> None:
        print(start_line(service, bound), file=sys.stderr, flush=True)

    server = Server(service, tell)
    asyncio.run(server.serve(sockets=[bound]))


def start_line(service: Service, bound: socket.socket) -> str:
    """Model, engine, context and address."""
    host = service.host
    name, (address, port, *_) = host.settings.name, bound.getsockname()
    shown = f"[{address}]" if ":" in address else address
    adapters = f", adapters {', '.join(host.settings.adapters)}" if host.settings.adapters else ""
    return (
        f"quantlab serve: {name}, {host.engine_name} engine, context of {host.context} tokens{adapters}, "
        f"http://{shown}:{port}"
    )


def model_name(model: str) -> str:
    """What clients call a model by default: its folder's or file's name, or the hub id."""
    path = Path(model)
    return path.resolve().name if path.exists() else model
