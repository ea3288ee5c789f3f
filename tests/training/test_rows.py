"""Files of rows: places, encodings, what is wrong with them; and which files are read."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from quantlab import InputError
from quantlab.training.data_files import DataFiles, find_data
from quantlab.training.row_forms import RowForm, Text
from quantlab.training.rows import Row, read_rows


def test_rows_know_their_lines(tmp_path: Path) -> None:
    """Empty lines count, a byte order mark is no part of a row, and a text may hold any line break but \\n."""
    lines = [b"\xef\xbb\xbf" + b'{"text": "a"}\r', b"", '{"text": "b\u2028\u0085c"}'.encode(), b'{"text": "d"}']
    for name, data in (("d.jsonl", b"\n".join(lines)), ("d.jsonl.gz", gzip.compress(b"\n".join(lines)))):
        (tmp_path / name).write_bytes(data)
        rows, faults = read_rows(tmp_path / name, RowForm())
        assert rows == [
            Row(f"{name}:1", Text("a")), Row(f"{name}:3", Text("b\u2028\u0085c")), Row(f"{name}:4", Text("d"))
        ]  # fmt: skip
        assert faults == []


def test_documents_of_a_text_file(tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_text("one\n<|endoftext|>\ntwo\n", encoding="utf-8")
    rows = [Row("d.txt:document 1", Text("one")), Row("d.txt:document 2", Text("two"))]
    assert read_rows(tmp_path / "d.txt", RowForm()) == (rows, [])


def test_every_bad_row_is_told_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    lines = [
        b'{"text": "good"}', b"{", b"[1]", b'{"text": "caf\xe9"}', b"[" * 100_000, b'{"text": ""}', b'{"text": "good"}'
    ]  # fmt: skip
    file.write_bytes(b"\n".join(lines))
    rows, faults = read_rows(file, RowForm())
    assert [row.place for row in rows] == ["d.jsonl:1", "d.jsonl:7"]
    assert faults[0].startswith("d.jsonl:2: no JSON (Expecting property name")
    assert faults[1:] == [
        "d.jsonl:3: is no JSON object",
        "d.jsonl:4: not UTF-8 text (byte 13 of the line)",
        "d.jsonl:5: no JSON that can be read (too deeply nested)",
        'd.jsonl:6: "text" is empty',
    ]


@pytest.mark.parametrize("data", [b"", b"\n \n"])
def test_a_file_without_rows(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_bytes(data)
    with pytest.raises(InputError, match="holds no rows"):
        read_rows(tmp_path / "d.jsonl", RowForm())


def _folder(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).write_text(json.dumps({"text": "a"}), encoding="utf-8")
    return folder


def test_a_folder_has_a_file_for_each_split(tmp_path: Path) -> None:
    folder = _folder(tmp_path, "train.jsonl.gz", "validation.txt", "test.jsonl", "more.jsonl", "notes.md")
    expected = DataFiles(folder / "train.jsonl.gz", folder / "validation.txt", folder / "test.jsonl", ("more.jsonl",))
    assert find_data(folder) == expected
    assert find_data(folder / "more.jsonl") == DataFiles(folder / "more.jsonl")


@pytest.mark.parametrize(
    ("names", "wanted", "reason"),
    [
        (["valid.jsonl"], "", "holds no train.jsonl"),
        (["train.jsonl", "train.txt"], "", "holds train.jsonl and train.txt"),
        (["train.jsonl", "valid.jsonl", "validation.jsonl"], "", "holds valid.jsonl and validation.jsonl"),
        ([], "nowhere", "no such file or folder"),
        (["data.json"], "data.json", "neither .jsonl"),
    ],
)
def test_folders_and_files_that_will_not_do(names, wanted, reason, tmp_path) -> None:
    with pytest.raises(InputError) as error:
        find_data(_folder(tmp_path, *names) / wanted)
    assert reason in str(error.value)
