"""Files of every kind as text; what holds none is refused in one line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pdf_pages import pdf
from pypdf import PdfReader, PdfWriter

from quantlab.retrieval import documents
from quantlab.retrieval.document_files import DocumentFile, Kind, UnreadableError
from quantlab.retrieval.documents import Document, read_bytes, read_document


def read(data: bytes, kind: Kind) -> Document:
    return read_document(DocumentFile("a", Path("a"), kind, len(data)), data)


def titles(document: Document) -> list[tuple[int, str, str]]:
    """Level, title and the beginning of the text at every heading."""
    return [(each.level, each.title, document.text[each.start :].split("\n")[0]) for each in document.headings]


def test_text_loses_its_byte_order_mark_and_carriage_returns():
    assert read("\ufeffa\r\nb\rc".encode(), "text").text == "a\nb\nc"
    assert read("größer".encode("utf-16"), "text").text == "größer"


@pytest.mark.parametrize(
    ("data", "kind", "reason"),
    [
        (b"", "text", "holds no text; the file is empty"),
        (b" \n\t", "markdown", "holds no text"),
        (b"\x7fELF\0\0\1", "text", "zero bytes: binary data"),
        (b"caf\xe9", "code", r"not UTF-8 text \(byte 3\)"),
        (b"<p>caf\xe9", "html", r"not in the encoding utf-8 \(byte 6\)"),
        (b'<meta charset="klingon"><p>a', "html", "unknown encoding klingon"),
        (b"<p>\0", "html", "zero bytes"),
        (b"<script>alert(1)</script>", "html", "holds no text"),
        (b"text", "pdf", "not a readable PDF"),
        (pdf("a")[:200], "pdf", "not a readable PDF|holds no text"),
        (pdf("", ""), "pdf", "its pages are pictures"),
    ],
)
def test_what_holds_no_text_is_refused(data, kind, reason):
    with pytest.raises(UnreadableError, match=reason) as caught:
        read(data, kind)
    assert str(caught.value).startswith("a: ")
    assert "\n" not in str(caught.value)


def test_headings_of_markdown_are_commonmarks():
    """Not in a fence, not in front matter; underlined ones count."""
    text = "---\n# no: heading\n---\n# One\n\n```\n# no heading\n```\n\nTwo *b*\n===\n\n#no\n\n### Three ###\ntext"
    document = read(text.encode(), "markdown")
    assert document.text == text
    assert titles(document) == [(1, "One", "# One"), (1, "Two *b*", "Two *b*"), (3, "Three", "### Three ###")]


def test_html_as_a_browser_shows_it():
    page = b"""<!DOCTYPE html><html><head><title>The  page</title><style>p {}</style><meta charset="latin-1"></head>
    <body><!-- comment --><h1>A <em>big</em>
    heading</h1><p>One   <b>two</b>, caf\xe9 &amp; more.</p><script>alert("no")</script><noscript>no</noscript>
    <p hidden>no</p><ul><li>first<li>second</ul><pre>a
      b</pre><table><tr><td>1</td><td>2</td></tr></table>line<br>break</body></html>"""
    document = read(page, "html")
    assert document.text == (
        "The page\n\nA big heading\n\nOne two, caf\u00e9 & more.\n\nfirst\nsecond\n\na\n      b\n\n1 2\n\nline\nbreak"
    )
    assert titles(document) == [(0, "The page", "The page"), (1, "A big heading", "A big heading")]


def test_html_may_nest_at_will():
    assert read(b"<div>" * 20_000 + b"deep" + b"</b>" * 20_000, "html").text == "deep"


def test_pages_of_a_pdf_are_its_places():
    document = read(pdf("First page.", "Second page.", "Third."), "pdf")
    assert document.text.split("\f") == ["First page.", "Second page.", "Third."]
    second = document.text.index("Second")
    assert document.place(second, second + 12) == "page 2"
    assert document.place(0, second + 1) == "pages 1 to 2"


def test_a_pdf_with_a_password_is_refused_and_one_without_is_not(tmp_path):
    for name, password in (("closed", "secret"), ("open", "")):
        writer = PdfWriter(PdfReader(_file(tmp_path, pdf("Words."))))
        writer.encrypt(password, "owner", algorithm="RC4-128")
        writer.write(tmp_path / name)
    assert read((tmp_path / "open").read_bytes(), "pdf").text == "Words."
    with pytest.raises(UnreadableError, match="is encrypted"):
        read((tmp_path / "closed").read_bytes(), "pdf")


def _file(folder: Path, data: bytes) -> Path:
    (folder / "plain.pdf").write_bytes(data)
    return folder / "plain.pdf"


def test_lines_are_the_places_of_text():
    document = Document("a", "text", "one\ntwo\nthree")
    assert [document.place(0, 4), document.place(4, 13), document.place(8, 13)] == ["line 1", "lines 2 to 3", "line 3"]


def test_files_that_are_no_files_or_too_large_are_refused(tmp_path, monkeypatch):
    """A pipe has no end to wait for, and a link may have come where a file was."""
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "large.txt").write_text("12345")
    (tmp_path / "link.txt").symlink_to(tmp_path / "large.txt")
    monkeypatch.setattr(documents, "MOST_BYTES", 4)
    for name, reason in (
        ("pipe", "no ordinary file"),
        ("link", "cannot be read"),
        ("large", "is larger"),
        ("x", "No such"),
    ):
        with pytest.raises(UnreadableError, match=reason):
            read_bytes(DocumentFile(name, tmp_path / f"{name}.txt", "text", 0))


def test_a_text_that_unpacks_to_too_much_is_refused(monkeypatch):
    monkeypatch.setattr(documents, "MOST_CHARACTERS", 10)
    with pytest.raises(UnreadableError, match="holds more than"):
        read(pdf("more than ten characters", "never read"), "pdf")
