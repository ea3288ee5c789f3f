"""Which files of a folder are documents, and of which kind each is; that goes by their names."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from quantlab.errors import InputError, one_line

Kind = Literal["text", "markdown", "html", "pdf", "code"]

_SUFFIXES: dict[Kind, str] = {
    "text": "txt text log rst adoc asciidoc org tex srt vtt csv tsv",
    "markdown": "md markdown mdown mkd mkdn",
    "html": "html htm xhtml",
    "pdf": "pdf",
    "code": "py pyi pyx c h cc cpp cxx hh hpp hxx cu cuh m mm rs go java kt kts scala groovy cs fs js mjs cjs jsx ts "
    "tsx vue svelte rb sh bash zsh fish ps1 php pl pm lua r jl swift dart nim zig hs ml mli ex exs erl clj lisp el scm "
    "f90 sql proto graphql tf cmake mk gradle css scss less toml yaml yml json ini cfg conf xml",
}
KINDS: Mapping[str, Kind] = {f".{suffix}": kind for kind, names in _SUFFIXES.items() for suffix in names.split()}
NAMES: Mapping[str, Kind] = {  # of files without a suffix
    "readme": "text", "license": "text", "licence": "text", "copying": "text", "notice": "text", "authors": "text",
    "changelog": "text", "changes": "text", "news": "text", "todo": "text", "install": "text", "contributing": "text",
    "makefile": "code", "dockerfile": "code", "justfile": "code", "gemfile": "code", "rakefile": "code",
}  # fmt: skip
GENERATED = frozenset({"__pycache__", "node_modules"})  # folders that programs fill


@dataclass(frozen=True)
class DocumentFile:
    """A document on disk; `source` is its path within the indexed folder, parted by "/"."""

    source: str
    path: Path
    kind: Kind
    bytes: int


@dataclass(frozen=True)
class Skipped:
    """A file that was left out, and why."""

    source: str
    reason: str


class UnreadableError(InputError):
    """A file that is left out: it is not what its name says, or holds no text."""

    def __init__(self, source: str, reason: str) -> None:
        super().__init__(f"{source}: {reason}")
        self.skipped = Skipped(source, one_line(reason))


@dataclass(frozen=True)
class Found:
    """What a folder holds: documents sorted by source, links and names that were not followed, and how many files have
    suffixes that name no kind.
    """

    files: tuple[DocumentFile, ...]
    skipped: tuple[Skipped, ...] = ()
    other_files: Mapping[str, int] = field(default_factory=dict)


def find_documents(docs: Path, leave_out: Path | None = None) -> Found:
    """The documents in a folder and the folders in it, or the one that is named itself.

    Hidden files and folders, `__pycache__` and `node_modules` are no documents. Links are not followed: what they lead
    to within the folder is found there, and what lies outside is not the folder's.

    Args:
        leave_out: a folder not to look into.

    Raises:
        InputError: there is no such file or folder, it cannot be read, or the file's name tells no kind.
    """
    try:
        if docs.is_file():
            return Found((_single(docs),))
        if not docs.is_dir():
            raise InputError(f"{docs}: no such file or folder")
        os.scandir(docs).close()
    except OSError as error:
        raise InputError(f"{docs}: cannot be read: {error.strerror}") from None
    root = docs.resolve()
    files, skipped, others = [], [], Counter[str]()
    for path in _files(root, leave_out.resolve() if leave_out is not None else None):
        source = path.relative_to(root).as_posix()
        if (kind := kind_of(path)) is None:
            others[path.suffix.lower() or "no suffix"] += 1
        elif path.is_symlink():
            if not path.resolve().is_relative_to(root):
                skipped.append(Skipped(source, "is a link that leads out of the folder"))
        elif not _is_text(source):
            skipped.append(Skipped(source, "its name is not UTF-8"))
        else:
            files.append(DocumentFile(source, path, kind, path.lstat().st_size))
    return Found(tuple(sorted(files, key=lambda file: file.source)), tuple(skipped), dict(others.most_common()))


def kind_of(path: Path) -> Kind | None:
    """By the name's suffix, or without one by the name; None for a file that is no document."""
    if path.name.lower() == "cmakelists.txt":
        return "code"
    return KINDS.get(path.suffix.lower()) if path.suffix else NAMES.get(path.name.lower())


def _single(path: Path) -> DocumentFile:
    kind = kind_of(path)
    if kind is None:
        raise InputError(
            f"{path}: its name tells no kind of document; text, Markdown, HTML, PDF and source code are read"
        )
    if not _is_text(path.name):
        raise InputError(f"{path}: its name is not UTF-8")
    return DocumentFile(path.name, path.resolve(), kind, path.stat().st_size)


def _files(root: Path, leave_out: Path | None) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        here = Path(folder)
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and name not in GENERATED and here / name != leave_out
        )
        for name in sorted(names):
            if not name.startswith("."):
                yield here / name


def _is_text(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:  # Python stands surrogates in for bytes that are no UTF-8
        return False
    return True
