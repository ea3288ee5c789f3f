"""JSON that somebody else wrote: what transformers would read alike, and nothing that only Python takes for JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from quantlab.checkpoint.json_file import MAX_BYTES, parse_json, read_json
from quantlab.errors import InputError


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_json(path)
    assert str(caught.value).isprintable()
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("{}", {}),
        (' {"a": [1, -2.5, 1e3, true, null, "b"]}\n', {"a": [1, -2.5, 1000.0, True, None, "b"]}),
        ('{"a": 1, "b": 2, "a": 3}', {"a": 3, "b": 2}),
        (
            '{"a": "Gr\u00fc\u00dfe \\u00e9 \\ud83d\\ude00 \\\\ud800"}',
            {"a": "Gr\u00fc\u00dfe \u00e9 \U0001f600 \\ud800"},
        ),
        ('{"a": 123456789012345678901234567890}', {"a": 123456789012345678901234567890}),
        ('{"a": "NaN"}', {"a": "NaN"}),
    ],
    ids=["empty", "all kinds", "twice", "texts", "large number", "NaN in a text"],
)
def test_objects_are_read(tmp_path: Path, text: str, value: object) -> None:
    """As Python's own reader, on which transformers relies, reads them: of two equal keys the last counts."""
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    assert read_json(tmp_path / "a.json") == value == json.loads(text)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"{}x", b"{'a': 1}", b'{"a": NaN}', b'{"a": [-Infinity]}', b'{"a": "\xff"}', b"\xff\xfe{\0}\0",
     b"\xef\xbb\xbf{}", b'{"a": "\n"}', b'{"a": "\\ud800"}', b'{"\\uDFFF": 1}', b"[" * 100_000, b'{"a":' * 100_000,
     b'{"a": ' + b"9" * 5000 + b"}", bytes(100)],
    ids=range(16),
)  # fmt: skip
def test_what_is_no_json_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    assert refusal(tmp_path / "a.json") == f"{tmp_path}/a.json: not valid JSON; download it again"


@pytest.mark.parametrize("content", ["[]", "[{}]", "1", '"{}"', "null", "true"])
def test_what_is_no_object_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    assert refusal(tmp_path / "a.json") == f"{tmp_path}/a.json: not a JSON object"


def test_a_file_that_is_not_there_means_another_folder(tmp_path: Path) -> None:
    """Also where a link leads nowhere or in a circle, or the folder is a file."""
    (tmp_path / "dangling.json").symlink_to("missing")
    (tmp_path / "loop.json").symlink_to("loop.json")
    (tmp_path / "file").touch()
    for path in (tmp_path / "a.json", tmp_path / "dangling.json", tmp_path / "loop.json", tmp_path / "file" / "a.json"):
        assert refusal(path) == f"{path.parent}: holds no {path.name}; is this a model folder?"


def test_what_is_no_plain_file_is_refused(tmp_path: Path) -> None:
    """Nobody waits for a pipe."""
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "folder.json").mkdir()
    for name in ("pipe.json", "folder.json"):
        assert refusal(tmp_path / name) == f"{tmp_path / name}: is a folder, pipe or device where a file should be"
    assert refusal(tmp_path / f"{'n' * 300}.json").endswith(": cannot be read: File name too long")


def test_a_file_beyond_any_models_is_not_read(tmp_path: Path) -> None:
    """Sparse, it would cost its maker nothing, and its reader all memory."""
    path = tmp_path / "a.json"
    path.write_text("{}")
    os.truncate(path, MAX_BYTES + 1)
    assert refusal(path) == f"{path}: has {MAX_BYTES + 1} bytes, too many for such a file; download it again"


def test_objects_may_be_made_of_their_pairs() -> None:
    assert parse_json(b'{"a": 1, "b": {"a": 2, "a": 3}}', list) == [("a", 1), ("b", [("a", 2), ("a", 3)])]
