"""Who may ask: the key, the Host, the Origin, and how large a request may be."""

from __future__ import annotations

import socket

import pytest

from quantlab.errors import InputError
from quantlab.serving.guards import is_loopback
from quantlab.serving.server import bind
from quantlab.serving.settings import ServerSettings


@pytest.fixture(scope="module")
def guarded(start, described):
    """A server with a key, a small limit, and a site whose pages may ask."""
    settings = ServerSettings(port=0, api_key="key-1", max_body=2000, cors_origin="https://chat.example.org")
    with start(described(), settings) as running:
        yield running


def test_a_key_is_needed_but_for_health_and_the_page(guarded) -> None:
    """As a bearer's token or x-api-key; refusals say how."""
    client = guarded.client
    assert client.get("/health").json == {"status": "ok"}
    assert client.get("/").status == 200
    for path in ("/v1/models", "/metrics", "/props"):
        reply = client.get(path)
        assert (reply.status, reply.error["code"]) == (401, "invalid_api_key")
        assert reply.headers["www-authenticate"] == "Bearer"
        assert client.get(path, Authorization="Bearer key-1").status == 200
        assert client.get(path, x_api_key="key-1").status == 200
    for wrong in ("Bearer key-2", "Bearer", "Basic key-1", "key-1", "Bearer \u00e9"):
        reply = client.ask("GET", "/v1/models", Authorization=wrong)
        assert reply.status == 401


def test_a_strange_host_is_refused(guarded) -> None:
    """A name that an attacker lets point to this machine; the machine's own names and the chosen site go through."""
    for host in ("attacker.example", "attacker.example:8080", "127.0.0.1.attacker.example", "10.0.0.1"):
        reply = guarded.client.get("/health", Host=host)
        assert (reply.status, reply.error["type"]) == (403, "permission_error")
    for host in ("localhost", "LOCALHOST:80", "127.0.0.1:1", "[::1]:8080", "127.1.2.3", "chat.example.org"):
        assert guarded.client.get("/health", Host=host).status == 200


def test_pages_of_strangers_may_not_ask(guarded) -> None:
    """Neither read nor cause work; the server's own page and the chosen site may."""
    client, key = guarded.client, {"Authorization": "Bearer key-1"}
    for origin in ("https://attacker.example", "null", "http://localhost:1"):
        assert client.get("/v1/models", Origin=origin, **key).status == 403
    own = client.get("/v1/models", Origin=guarded.url, **key)
    assert own.status == 200
    assert "access-control-allow-origin" not in own.headers
    site = client.get("/v1/models", Origin="https://chat.example.org", **key)
    assert site.headers["access-control-allow-origin"] == "https://chat.example.org"
    asked = {"Origin": "https://chat.example.org", "Access-Control-Request-Method": "POST"}
    preflight = client.ask("OPTIONS", "/v1/chat/completions", **asked)
    assert preflight.status == 200
    asked["Origin"] = "https://attacker.example"
    assert client.ask("OPTIONS", "/v1/chat/completions", **asked).status == 400


def test_a_request_may_not_be_too_large(guarded) -> None:
    """By what it announces, or by what comes when it announces nothing; nothing of it is parsed."""
    key = {"Authorization": "Bearer key-1"}
    reply = guarded.client.post("/v1/completions", b"x" * 2001, **key)
    assert (reply.status, reply.error["code"]) == (413, "request_too_large")
    assert "2000 bytes" in reply.error["message"]
    assert guarded.client.post("/v1/completions", b"x" * 2000, **key).status == 400
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer key-1\r\n"
    with socket.create_connection(("127.0.0.1", guarded.port), timeout=60) as connection:
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        for _ in range(3):
            connection.sendall(b"400\r\n" + b"x" * 0x400 + b"\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413")
    with socket.create_connection(("127.0.0.1", guarded.port), timeout=60) as connection:
        connection.sendall(f"{head}Content-Length: 99999999999999999999\r\n\r\n".encode())
        assert connection.recv(100).startswith((b"HTTP/1.1 413", b"HTTP/1.1 400"))


def test_without_cors_no_page_of_others_is_answered(running) -> None:
    """The default."""
    reply = running.client.get("/v1/models", Origin="https://chat.example.org")
    assert reply.status == 403
    assert "--cors-origin" in reply.error["message"]
    assert not [name for name in reply.headers if name.startswith("access-control")]


def test_the_page_can_load_nothing_from_elsewhere(running) -> None:
    """What a model writes into it neither."""
    policy = running.client.get("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy


def test_other_addresses_need_a_key() -> None:
    """Whoever reaches the machine could ask else; and addresses that cannot be had are told of in one line."""
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
        with pytest.raises(InputError, match="--api-key"):
            bind(ServerSettings(host=host, port=0))
    with pytest.raises(InputError, match="--port 70000"):
        bind(ServerSettings(port=70000))
    with bind(ServerSettings(port=0)) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"127.0.0.1:{port}: cannot be served: address already in use"):
            bind(ServerSettings(port=port))
    with pytest.raises(InputError, match="cannot be served"):
        bind(ServerSettings(host="192.0.2.1", port=0, api_key="k"))


def test_loopback_is_this_machine_alone() -> None:
    """Names and addresses of any spelling."""
    assert all(map(is_loopback, ("localhost", "LocalHost", "127.0.0.1", "127.9.9.9", "::1", "[::1]")))
    assert not any(map(is_loopback, ("0.0.0.0", "", "localhost.example.org", "192.168.0.1", "::", "127.0.0.1.nip.io")))
