"""Files as documents: bytes of every kind become text, with headings where the kind has them."""

from __future__ import annotations

import os
import stat
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from quantlab.retrieval.document_files import DocumentFile, Kind, UnreadableError

MOST_BYTES = 64_000_000  # of a file
MOST_CHARACTERS = 32_000_000  # of the text in it: a small PDF may unpack to any size
PAGE_BREAK = "\f"
_BYTE_ORDER_MARKS = ((b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"), (b"\xef\xbb\xbf", "utf-8-sig"))


@dataclass(frozen=True)
class Heading:
    """The line of a heading begins at character `start`; level 1 is the highest but for a title's, 0."""

    start: int
    level: int
    title: str


@dataclass(frozen=True)
class Document:
    """A text that is not blank. Pages, where the kind has them, are parted by form feeds."""

    source: str
    kind: Kind
    text: str
    headings: tuple[Heading, ...] = ()

    @cached_property
    def _borders(self) -> list[int]:
        border = PAGE_BREAK if self.kind == "pdf" else "\n"
        return [index for index, character in enumerate(self.text) if character == border]

    def place(self, start: int, end: int) -> str:
        """Where the characters from `start` to `end` (exclusive) are, as a reader of the file would look for them."""
        if self.kind == "html":  # its lines are not the file's
            return ""
        first, last = (bisect_right(self._borders, index - 1) + 1 for index in (start, max(start + 1, end) - 1))
        unit = "page" if self.kind == "pdf" else "line"
        return f"{unit} {first}" if first == last else f"{unit}s {first} to {last}"


def read_bytes(file: DocumentFile) -> bytes:
    """The content of a file.

    Raises:
        UnreadableError: it cannot be read, is a link or no ordinary file by now, or is too large.
    """
    try:
        # A pipe would wait for its writer; a link may have taken the file's place since it was found.
        descriptor = os.open(file.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as opened:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise UnreadableError(file.source, "is no ordinary file")
            if status.st_size > MOST_BYTES:
                raise UnreadableError(
                    file.source, f"is larger than {MOST_BYTES // 1_000_000} MB; part it into smaller files"
                )
            return opened.read(MOST_BYTES)
    except OSError as error:
        raise UnreadableError(file.source, f"cannot be read: {error.strerror}") from None


def read_document(file: DocumentFile, data: bytes) -> Document:
    """The text of a file's content.

    Raises:
        UnreadableError: it is not of the kind that its name says, holds no text, or too much of it.
    """
    text, headings = _READERS[file.kind](file.source, data)
    if len(text) > MOST_CHARACTERS:
        raise UnreadableError(file.source, f"holds more than {MOST_CHARACTERS // 1_000_000} million characters")
    if not text.strip():
        raise UnreadableError(file.source, f"holds no text{_why_empty(file.kind, data)}")
    return Document(file.source, file.kind, text, headings)


def _why_empty(kind: Kind, data: bytes) -> str:
    if not data:
        return "; the file is empty"
    return "; its pages are pictures: run character recognition over it first" if kind == "pdf" else ""


def decoded(source: str, data: bytes) -> str:
    """Text in UTF-8, or in what its byte order mark says, with line breaks of one character.

    Raises:
        UnreadableError: it is in another encoding, or no text.
    """
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS if data.startswith(mark)), "utf-8")
    if encoding != "utf-16" and b"\0" in data:
        raise UnreadableError(source, "holds zero bytes: binary data, not text")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise UnreadableError(source, f"not UTF-8 text (byte {error.start}); convert it to UTF-8 first") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _plain(source: str, data: bytes) -> tuple[str, tuple[Heading, ...]]:
    return decoded(source, data), ()


def _markdown(source: str, data: bytes) -> tuple[str, tuple[Heading, ...]]:
    from quantlab.retrieval.markdown_headings import markdown_headings

    text = decoded(source, data)
    return text, tuple(Heading(*found) for found in markdown_headings(text))


def _html(source: str, data: bytes) -> tuple[str, tuple[Heading, ...]]:
    from quantlab.retrieval.html_text import html_text

    text, found = html_text(source, data)
    return text, tuple(Heading(*each) for each in found)


def _pdf(source: str, data: bytes) -> tuple[str, tuple[Heading, ...]]:
    from quantlab.retrieval.pdf_text import pdf_pages

    pages = pdf_pages(source, data, MOST_CHARACTERS)
    return PAGE_BREAK.join(page.replace(PAGE_BREAK, "\n") for page in pages), ()


_READERS: Mapping[Kind, Callable[[str, bytes], tuple[str, tuple[Heading, ...]]]] = {
    "text": _plain,
    "code": _plain,
    "markdown": _markdown,
    "html": _html,
    "pdf": _pdf,
}
