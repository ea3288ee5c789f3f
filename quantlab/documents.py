"""Text files as documents: UTF-8, plain or gzipped, parted by lines that hold only `<|endoftext|>`."""

from __future__ import annotations

import gzip
import re
import zlib
from pathlib import Path

from quantlab.errors import InputError

DOCUMENT_END = "<|endoftext|>"  # on a line of its own; GPT-2's convention for text files


def read_documents(path: Path) -> list[str]:
    """Split a UTF-8 text file (optionally gzipped) at lines that hold only `<|endoftext|>`.

    Raises:
        InputError: the file cannot be read, is not UTF-8, or holds no text.
    """
    text = read_text(path)
    parts = re.split(rf"^{re.escape(DOCUMENT_END)}\r?$", text, flags=re.MULTILINE)
    documents = [part.strip("\r\n") for part in parts if part.strip()]
    if not documents:
        raise InputError(f"{path}: holds no text")
    return documents


def read_text(path: Path) -> str:
    """The content of a UTF-8 text file, gzipped if its name ends in `.gz`.

    Raises:
        InputError: the file cannot be read, or is not UTF-8.
    """
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}); convert it to UTF-8 first") from None


def read_bytes(path: Path) -> bytes:
    """The content of a file, gzipped if its name ends in `.gz`.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
