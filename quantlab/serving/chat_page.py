"""The chat page: one HTML document that needs nothing from elsewhere, and the headers that keep it so.

Its parts are files in page/. They are joined in memory: styles and scripts take the place of the tags that name them.
The policy names each by its hash, so the browser runs these and nothing else, whatever a model may write into the page;
trusted types forbid that text becomes HTML at all.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files

_PART = re.compile(r'<link rel="stylesheet" href="([a-z_]+\.css)">|<script src="([a-z_]+\.js)"></script>')


@dataclass(frozen=True)
class ChatPage:
    """The document in UTF-8, and what it is sent with."""

    content: bytes
    headers: Mapping[str, str]


@functools.cache
def chat_page() -> ChatPage:
    """The page as it is installed."""
    folder = files("quantlab.serving") / "page"
    hashes: dict[str, list[str]] = {"style": [], "script": []}

    def joined(found: re.Match[str]) -> str:
        tag = "style" if found[1] else "script"
        text = "\n" + (folder / (found[1] or found[2])).read_text(encoding="utf-8")
        assert f"</{tag}" not in text, "the part would end there"
        hashes[tag].append(_source_hash(text))
        return f"<{tag}>{text}</{tag}>"

    document = _PART.sub(joined, (folder / "index.html").read_text(encoding="utf-8"))
    return ChatPage(document.encode(), _headers(hashes["style"], hashes["script"]))


def _source_hash(text: str) -> str:
    """As Content-Security-Policy writes it (https://www.w3.org/TR/CSP3/#grammardef-hash-source)."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _headers(styles: list[str], scripts: list[str]) -> dict[str, str]:
    policy = (
        "default-src 'none'",
        f"script-src {' '.join(scripts)}",
        f"style-src {' '.join(styles)}",
        "connect-src 'self'",
        "img-src data:",  # its icon
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
    return {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": "; ".join(policy),
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cache-Control": "no-cache",
    }
