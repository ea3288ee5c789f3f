"""The text that a browser would show of an HTML page, and its headings; scripts and styles are none."""

from __future__ import annotations

import re
from typing import Any

from quantlab.errors import missing_extra
from quantlab.retrieval.document_files import UnreadableError

DROPPED = frozenset(
    {"script", "style", "template", "noscript", "iframe", "object", "svg", "math", "select", "textarea"}
)
BLOCKS = frozenset(
    {
        "address", "article", "aside", "blockquote", "body", "br", "caption", "dd", "details", "div", "dl", "dt",
        "figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr", "html", "li",
        "main", "nav", "ol", "p", "pre", "section", "summary", "table", "tbody", "tfoot", "thead", "title", "tr", "ul",
    }
)  # fmt: skip
PARAGRAPHS = frozenset({"article", "blockquote", "dl", "figure", "ol", "p", "pre", "section", "table", "title", "ul"})
CELLS = frozenset({"td", "th"})
LEVELS = {"title": 0, **{f"h{level}": level for level in range(1, 7)}}


def html_text(source: str, data: bytes) -> tuple[str, list[tuple[int, int, str]]]:
    """Text, and (first character, level, title) of every heading; the page's title has level 0.

    Raises:
        UnreadableError: the bytes are not in the encoding that the page declares, or without one not UTF-8.
    """
    try:
        from bs4 import BeautifulSoup
        from bs4.element import PreformattedString, Tag
    except ImportError:
        raise missing_extra("beautifulsoup4", "retrieval") from None

    page = BeautifulSoup(_decoded(source, data), "html.parser")
    writer = _Writer()
    waiting: list[tuple[Any, bool]] = [(page, False)]  # Any: bs4's nodes; True: the element ends. Pages nest at will,
    while waiting:  # hence no recursion
        node, ends = waiting.pop()
        if ends:
            writer.end(node.name)
        elif isinstance(node, Tag):
            if node.name in DROPPED or node.has_attr("hidden"):
                continue
            writer.begin(node.name)
            waiting.append((node, True))
            waiting.extend((child, False) for child in reversed(node.contents))
        elif not isinstance(node, PreformattedString):  # comments, declarations
            writer.add(str(node))
    return writer.finished()


def _decoded(source: str, data: bytes) -> str:
    from bs4.dammit import EncodingDetector

    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding = "utf-16"
    else:
        encoding = EncodingDetector.find_declared_encoding(data, is_html=True, search_entire_document=False) or "utf-8"
        if b"\0" in data:
            raise UnreadableError(source, "holds zero bytes: binary data, not a page")
    try:
        return data.decode(encoding).removeprefix("\ufeff")
    except LookupError:
        raise UnreadableError(source, f"declares the unknown encoding {encoding}; convert it to UTF-8 first") from None
    except UnicodeDecodeError as error:
        raise UnreadableError(
            source, f"not in the encoding {encoding} (byte {error.start}); convert it to UTF-8 first"
        ) from None


class _Writer:
    """Text with the blanks of HTML: a run of them is one space but in `pre`, blocks begin lines."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._length = 0
        self._breaks = 0  # line breaks owed before the next text
        self._space = False  # a space owed
        self._preformatted = 0
        self._heading: tuple[int, int] | None = None  # level, first piece
        self._headings: list[tuple[int, int, str]] = []
        self._starts: list[int] = []

    def begin(self, name: str) -> None:
        self._border(name)
        self._preformatted += name == "pre"
        if name in LEVELS:
            self._heading = LEVELS[name], len(self._pieces)

    def end(self, name: str) -> None:
        self._preformatted -= name == "pre"
        if name in LEVELS and self._heading is not None:
            level, first = self._heading
            written = "".join(self._pieces[first:])
            if title := written.strip():
                start = self._starts[first] + len(written) - len(written.lstrip())
                self._headings.append((start, level, " ".join(title.split())))
            self._heading = None
        self._border(name)

    def add(self, text: str) -> None:
        if self._preformatted:
            self._write(text)
            return
        words = text.split()
        self._space = self._space or text[:1].isspace()
        if words:
            self._write(" ".join(words))
            self._space = text[-1:].isspace()

    def finished(self) -> tuple[str, list[tuple[int, int, str]]]:
        return "".join(self._pieces), self._headings

    def _border(self, name: str) -> None:
        if name in BLOCKS or name in LEVELS:
            self._breaks = max(self._breaks, 2 if name in PARAGRAPHS or name in LEVELS else 1)
        elif name in CELLS:
            self._space = True

    def _write(self, text: str) -> None:
        if self._breaks and self._length:
            self._put("\n" * self._breaks)
        elif self._space and self._length:
            self._put(" ")
        self._breaks, self._space = 0, False
        self._put(re.sub(r"\r\n?", "\n", text))

    def _put(self, piece: str) -> None:
        self._starts.append(self._length)
        self._pieces.append(piece)
        self._length += len(piece)
