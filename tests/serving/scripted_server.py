"""A server that says what a test tells it: the chat page, and answers piece by piece in the shape of OpenAI's API."""

from __future__ import annotations

import json
import socketserver
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from quantlab.serving.chat_page import chat_page


def chunk(content: str = "", finish: str | None = None, **more: Any) -> dict[str, Any]:
    """One event of a streamed answer; `more` stands beside the choices."""
    delta = {"content": content} if content else {}
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **more}


def thought(text: str) -> dict[str, Any]:
    """One event of reasoning."""
    return {"choices": [{"index": 0, "delta": {"reasoning_content": text}, "finish_reason": None}]}


@dataclass
class Reply:
    """What the server says to one question.

    Attributes:
        events: chunks; text is sent as it is.
        hold: waited for after the events; the connection stays open and busy meanwhile.
        is_whole: end as an answer does; else the connection just closes.
        error: sent with the status instead.
    """

    events: Sequence[dict[str, Any] | str] = ()
    hold: threading.Event | None = None
    is_whole: bool = True
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    error: str = ""
    code: str | None = None


def said(*pieces: str, **more: Any) -> Reply:
    """A whole answer; `more` goes with its end."""
    return Reply([*(chunk(piece) for piece in pieces), chunk(finish="stop", **more)])


class ScriptedServer(ThreadingHTTPServer):
    """Serves until `close`.

    Attributes:
        replies: for the questions to come, in order.
        requests: the questions that came: bodies and headers.
        gone: set when a client has left in the middle of an answer.
        key: that requests must carry, if any.
        models, model_details: the names at /v1/models, and what is told of each.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.page = chat_page()
        self.replies: deque[Reply] = deque()
        self.requests: list[dict[str, Any]] = []
        self.authorizations: list[str | None] = []
        self.gone = threading.Event()
        self.key = ""
        self.models = ["tiny"]
        self.model_details: dict[str, Any] = {}
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def server_bind(self) -> None:
        """Without looking the machine's name up, which may take seconds."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "127.0.0.1", self.server_address[1]

    @property
    def address(self) -> str:
        """Of the page."""
        return f"http://127.0.0.1:{self.server_address[1]}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is what some tests are about."""

    def close(self) -> None:
        """Stop."""
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: ScriptedServer

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/":
            self._send(200, self.server.page.content, self.server.page.headers)
        elif self.path == "/v1/models" and self._is_allowed():
            models = [{"id": name, **self.server.model_details} for name in self.server.models]
            self._send_json(200, {"object": "list", "data": models})
        elif self.path.startswith("/v1/"):
            self._send_error(401, "a key is needed", None)
        else:
            self._send_error(404, "not here", None)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._is_allowed():
            return self._send_error(401, "a key is needed", None)
        self.server.requests.append(body)
        self.server.authorizations.append(self.headers.get("Authorization"))
        reply = self.server.replies.popleft()
        if reply.status != 200:
            return self._send_error(reply.status, reply.error, reply.code, reply.headers)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            self._stream(reply)
        except OSError:
            self.server.gone.set()

    def _stream(self, reply: Reply) -> None:
        for event in reply.events:
            text = event if isinstance(event, str) else f"data: {json.dumps(event)}\n\n"
            self.wfile.write(text.encode())
        if reply.hold is not None:
            while not reply.hold.wait(0.02):
                self.wfile.write(b": still here\n\n")
        if reply.is_whole:
            self.wfile.write(b"data: [DONE]\n\n")

    def _is_allowed(self) -> bool:
        return not self.server.key or self.headers.get("Authorization") == f"Bearer {self.server.key}"

    def _send_error(
        self, status: int, message: str, code: str | None, headers: Mapping[str, str] | None = None
    ) -> None:
        self._send_json(status, {"error": {"message": message, "type": "error", "code": code}}, headers)

    def _send_json(self, status: int, content: Any, headers: Mapping[str, str] | None = None) -> None:
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
