"""Which files of a folder are documents: by their names, never behind a link, nothing hidden."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from quantlab.errors import InputError
from quantlab.retrieval.document_files import find_documents


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("text", encoding="utf-8")


def test_kinds_go_by_names(tmp_path):
    names = ["a.TXT", "b.md", "c.html", "d.pdf", "sub/e.py", "Makefile", "CMakeLists.txt", "LICENSE"]
    write(tmp_path, *names, "picture.png", "other.png", "core")
    found = find_documents(tmp_path)
    assert [(file.source, file.kind, file.bytes) for file in found.files] == [
        ("CMakeLists.txt", "code", 4), ("LICENSE", "text", 4), ("Makefile", "code", 4), ("a.TXT", "text", 4),
        ("b.md", "markdown", 4), ("c.html", "html", 4), ("d.pdf", "pdf", 4), ("sub/e.py", "code", 4),
    ]  # fmt: skip
    assert found.other_files == {".png": 2, "no suffix": 1}


def test_hidden_and_generated_files_and_the_index_are_left_out(tmp_path):
    write(
        tmp_path,
        "a.txt",
        ".b.txt",
        ".git/c.txt",
        "__pycache__/d.txt",
        "node_modules/e.js",
        "index/f.txt",
        "g/index/h.md",
    )
    found = find_documents(tmp_path, leave_out=tmp_path / "index")
    assert [file.source for file in found.files] == ["a.txt", "g/index/h.md"]


def test_links_are_not_followed(tmp_path):
    """One that leads out is told of; one to a document of the folder would only give it twice."""
    write(tmp_path, "secret/key.txt", "docs/a.txt")
    (tmp_path / "docs" / "inside.txt").symlink_to(tmp_path / "docs" / "a.txt")
    (tmp_path / "docs" / "outside.txt").symlink_to(tmp_path / "secret" / "key.txt")
    (tmp_path / "docs" / "folder").symlink_to(tmp_path / "secret")
    found = find_documents(tmp_path / "docs")
    assert [file.source for file in found.files] == ["a.txt"]
    assert [(each.source, each.reason) for each in found.skipped] == [
        ("outside.txt", "is a link that leads out of the folder")
    ]


def test_one_file_is_a_document_by_its_own_name(tmp_path):
    write(tmp_path, "a.md", "b.bin")
    (file,) = find_documents(tmp_path / "a.md").files
    assert (file.source, file.kind) == ("a.md", "markdown")
    with pytest.raises(InputError, match=r"b\.bin: its name tells no kind of document"):
        find_documents(tmp_path / "b.bin")


def test_a_name_that_is_no_text_is_skipped(tmp_path):
    write(tmp_path, "a.txt")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.txt")).write_text("text")
    found = find_documents(tmp_path)
    assert [file.source for file in found.files] == ["a.txt"]
    assert [each.reason for each in found.skipped] == ["its name is not UTF-8"]


@pytest.mark.parametrize("name", ["missing", "a\0b", "x" * 300])
def test_a_folder_that_is_not_there(tmp_path, name):
    with pytest.raises(InputError):
        find_documents(tmp_path / name)
