"""Files of training data -> rows, each with its place; what is wrong with a row is collected, not raised at once."""

from __future__ import annotations

import codecs
import json
from dataclasses import dataclass
from pathlib import Path

from quantlab.documents import read_bytes, read_documents
from quantlab.errors import InputError
from quantlab.training.data_files import TEXT
from quantlab.training.row_forms import Content, RowForm, Text


@dataclass(frozen=True)
class Row:
    """One row; `place` is its file's name and its line (of a text file: its document), as in `train.jsonl:3`."""

    place: str
    content: Content


def read_rows(path: Path, form: RowForm) -> tuple[list[Row], list[str]]:
    """The rows of a `.jsonl` file, or the documents of a `.txt` file; and what is wrong with the others, by place.

    Raises:
        InputError: the file cannot be read, or holds nothing.
    """
    if path.name.endswith(TEXT):
        documents = enumerate(read_documents(path), start=1)
        return [Row(f"{path.name}:document {number}", Text(text)) for number, text in documents], []
    rows, faults = [], []
    lines = read_bytes(path).removeprefix(codecs.BOM_UTF8).split(b"\n")  # a text in JSON may hold other line breaks
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{path.name}:{number}"
        try:
            rows.append(Row(place, form.content(_parsed(line))))
        except InputError as error:
            faults.append(f"{place}: {error}")
    if not rows and not faults:
        raise InputError(f"{path}: holds no rows; each line must be a JSON object")
    return rows, faults


def _parsed(line: bytes) -> object:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 text (byte {error.start} of the line)") from None
    except RecursionError:
        raise InputError("no JSON that can be read (too deeply nested)") from None
    except ValueError as error:
        raise InputError(f"no JSON ({error})") from None
