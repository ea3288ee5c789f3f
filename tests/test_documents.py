"""Text files; how documents are parted is tested with the corpora that they make (training/test_corpus.py)."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from quantlab.documents import read_documents, read_text
from quantlab.errors import InputError

TEXT = "one\n<|endoftext|>\ntwo <|endoftext|> two\n<|endoftext|>\r\nthree"


@pytest.mark.parametrize("name", ["text.txt", "text.txt.gz"])
def test_plain_and_gzipped_files_are_read_alike(name: str, tmp_path: Path) -> None:
    """The whole text, or its documents: a mark counts on a line of its own."""
    data = TEXT.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert read_text(tmp_path / name) == TEXT
    assert read_documents(tmp_path / name) == ["one", "two <|endoftext|> two", "three"]


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    """Nothing there, or no UTF-8."""
    with pytest.raises(InputError, match="cannot be read"):
        read_text(tmp_path / "nothing.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match=r"not UTF-8 text \(byte 3\)"):
        read_text(tmp_path / "latin.txt")
