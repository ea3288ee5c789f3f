"""Who may ask: the key, and no pages of strangers.

A page of any site can send requests to a server on its reader's machine, and by changing what its own name resolves to
(DNS rebinding) read the answers too. The first shows in the Origin header, the second in Host.
"""

from __future__ import annotations

import hmac
import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from quantlab.serving.api_error import ApiError
from quantlab.serving.settings import ServerSettings

OPEN_PATHS = ("/health", "/")  # without a key: the page holds no secret and asks for it
LOCAL_NAMES = ("localhost",)


def is_loopback(host: str) -> bool:
    """Whether a name or address means this machine alone."""
    if host.lower().rstrip(".") in LOCAL_NAMES:
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Guards:
    """Lets requests through, or raises `ApiError`: 401 for a wrong key, 403 for a strange Host or Origin."""

    def __init__(self, app: ASGIApp, *, settings: ServerSettings) -> None:
        self._app, self._settings = app, settings
        self._is_local = is_loopback(settings.host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            self._check_host(headers)
            self._check_origin(headers)
            if scope["path"] not in OPEN_PATHS and scope["method"] != "OPTIONS":
                self._check_key(headers)
        await self._app(scope, receive, send)

    def _check_host(self, headers: Headers) -> None:
        host = headers.get("host", "")
        if host and host == _site(self._settings.cors_origin or ""):
            return  # of a proxy on this machine, which serves that site
        if self._is_local and host and not is_loopback(_name(host)):
            raise ApiError(403, f"Host {host[:100]!r} is not this machine; the server listens here only")

    def _check_origin(self, headers: Headers) -> None:
        origin = headers.get("origin")
        if origin is None or self._settings.cors_origin in (origin, "*"):
            return
        if _site(origin) != headers.get("host"):
            raise ApiError(403, f"pages of {origin[:100]!r} may not ask here (quantlab serve --cors-origin)")

    def _check_key(self, headers: Headers) -> None:
        expected = self._settings.api_key
        if expected is None:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        key = given.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        if not hmac.compare_digest(key.encode("utf-8", "surrogateescape"), expected.encode("utf-8")):
            told = "the API key is wrong" if key else "an API key is needed: Authorization: Bearer KEY"
            raise ApiError(401, told, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _site(origin: str) -> str:
    """Host and port of an origin."""
    return origin.partition("://")[2]


def _name(host: str) -> str:
    """Of a Host header, without the port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
