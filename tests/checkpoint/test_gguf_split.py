"""GGUF models in several files: all parts are found and make one, or the line says which is wrong."""

from __future__ import annotations

import os
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_bytes import FLOAT32, INT32, STRING, UINT16, UINT32, array, entry, gguf_file, number, tensor, text

from quantlab.checkpoint.gguf_checkpoint import open_split
from quantlab.errors import InputError


def part_name(number: int, count: int, stem: str = "model") -> str:
    return f"{stem}-{number:05}-of-{count:05}.gguf"


def write_part(
    folder: Path, number_: int, count: int, *names: str, no: int | None = None, total: int | None = None
) -> Path:
    """A part as llama.cpp's tool writes it, with a tensor of four fp32 numbers for each name."""
    entries = [
        number("split.no", UINT16, number_ - 1 if no is None else no),
        number("split.count", UINT16, count),
        number("split.tensors.count", INT32, count if total is None else total),
    ]
    tensors = [tensor(name, [4], offset=32 * place) for place, name in enumerate(names)]
    data = b"".join(np.full(8, number_, "<f4").tobytes() for _ in names)
    path = folder / part_name(number_, count)
    path.write_bytes(gguf_file(entries, tensors, data))
    return path


def three_parts(folder: Path) -> list[Path]:
    return [write_part(folder, part, 3, f"t{part}") for part in (1, 2, 3)]


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        open_split(path)
    assert str(caught.value).isprintable()
    return str(caught.value)


def test_parts_come_in_order(tmp_path: Path) -> None:
    paths = three_parts(tmp_path)
    files = open_split(paths[0])
    assert [file.path for file in files] == paths
    assert [list(file.entries) for file in files] == [["t1"], ["t2"], ["t3"]]
    assert [file.read(f"t{part}").view("<f4").tolist() for part, file in enumerate(files, 1)] == [
        [1.0] * 4,
        [2.0] * 4,
        [3.0] * 4,
    ]


@pytest.mark.parametrize("header_first", [False, True])
def test_parts_that_the_package_wrote_are_read(tmp_path: Path, header_first: bool) -> None:
    """By number of tensors; the first may hold metadata only."""
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=2, small_first_shard=header_first)
    arrays = {f"t{place}": np.full((2, 3), place, np.float32) for place in range(5)}
    for name, values in arrays.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    count = 4 if header_first else 3
    files = open_split(tmp_path / part_name(1, count, "m"))
    assert len(files) == count
    found = {name: file.read(name).view("<f4").reshape(2, 3) for file in files for name in file.entries}
    assert found.keys() == arrays.keys()
    assert all(np.array_equal(found[name], arrays[name]) for name in arrays)


@pytest.mark.parametrize("count", [None, 0, 1])
def test_one_file_is_itself(tmp_path: Path, count: int | None) -> None:
    """Whatever it is called."""
    entries = [] if count is None else [number("split.count", UINT16, count)]
    for name in ("model.gguf", part_name(2, 3)):
        (tmp_path / name).write_bytes(gguf_file(entries))
        assert [file.path for file in open_split(tmp_path / name)] == [tmp_path / name]


def test_linked_parts_are_read(tmp_path: Path) -> None:
    """The hub's cache has them in another folder, under other names."""
    (tmp_path / "blobs").mkdir()
    for place, path in enumerate(three_parts(tmp_path)):
        path.rename(tmp_path / "blobs" / str(place))
        path.symlink_to(tmp_path / "blobs" / str(place))
    assert len(open_split(tmp_path / part_name(1, 3))) == 3


def test_any_other_part_is_sent_to_the_first(tmp_path: Path) -> None:
    paths = three_parts(tmp_path)
    for place in (2, 3):
        line = refusal(paths[place - 1])
        assert line == f"{paths[place - 1]}: is part {place} of 3; name the first, ...-00001-of-00003.gguf"


def test_a_part_that_is_missing_is_named(tmp_path: Path) -> None:
    """Also where a loop of links, a folder or a pipe is in its place."""
    paths = three_parts(tmp_path)
    line = f"{paths[0]}: its part {paths[2].name} is missing; download it"
    paths[2].unlink()
    assert refusal(paths[0]) == line
    paths[2].symlink_to(paths[2])
    assert refusal(paths[0]) == line
    paths[2].unlink()
    paths[2].mkdir()
    assert refusal(paths[0]) == line
    paths[2].rmdir()
    os.mkfifo(paths[2])
    assert refusal(paths[0]) == line


def test_parts_that_go_in_circles_are_refused(tmp_path: Path) -> None:
    """The second is the first again, or the third; or says that it belongs to another set."""
    paths = three_parts(tmp_path)
    line = f"{paths[1]}: is not part 2 of 3, whatever its name says; download it again"
    for other in (paths[0], paths[2]):
        paths[1].unlink()
        paths[1].symlink_to(other)
        assert refusal(paths[0]) == line
    paths[1].unlink()
    write_part(tmp_path, 2, 4, "t2").rename(paths[1])
    assert refusal(paths[0]) == line
    paths[1].write_bytes(gguf_file())
    assert refusal(paths[0]) == line


def test_a_count_that_the_name_does_not_bear_out_is_refused(tmp_path: Path) -> None:
    """Nobody goes looking for sixty thousand files."""
    first = three_parts(tmp_path)[0]
    for name in (
        "model.gguf",
        part_name(1, 4),
        "-00001-of-00003",
        "model-\u0660\u0660\u0660\u0660\u0661-of-00003.gguf",
    ):
        path = tmp_path / name
        path.write_bytes(first.read_bytes())
        assert refusal(path) == (
            f"{path}: split.count is 3, which its name (...-00001-of-0000N.gguf) does not bear out"
        )
    content = first.read_bytes()
    at = content.index(b"split.count") + 11 + 4
    for count in (2, 65535):
        first.write_bytes(content[:at] + count.to_bytes(2, "little") + content[at + 2 :])
        assert "does not bear out" in refusal(first)


def test_a_first_part_that_says_that_it_is_another_is_refused(tmp_path: Path) -> None:
    path = write_part(tmp_path, 1, 3, "t1", no=1)
    assert refusal(path) == f"{path}: is part 1 of 3; name the first, ...-00001-of-00003.gguf"


def test_a_tensor_in_two_parts_is_refused(tmp_path: Path) -> None:
    paths = three_parts(tmp_path)
    write_part(tmp_path, 3, 3, "t1")
    assert refusal(paths[0]) == f"{paths[0]}: tensor t1 is in two of its parts; download them again"


@pytest.mark.parametrize("total", [-1, 0, 2, 4, (1 << 31) - 1])
def test_a_wrong_number_of_tensors_is_refused(tmp_path: Path, total: int) -> None:
    paths = three_parts(tmp_path)
    write_part(tmp_path, 1, 3, "t1", total=total)
    assert refusal(paths[0]) == f"{paths[0]}: split.tensors.count is {total}, and its parts hold 3 tensors"


WRONG = {
    "text": (entry("KEY", STRING, text("3\n\x1b[2J")), r"'3\n\x1b[2J'"),
    "fraction": (number("KEY", FLOAT32, 3.0), "3.0"),
    "list": (array("KEY", UINT32, 2, b"\3\0\0\0" * 2), "array([3, 3], dtype=uint32)"),
    "texts": (array("KEY", STRING, 1, text("3")), "['3']"),
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("key", ["split.count", "split.no", "split.tensors.count"])
def test_values_that_are_no_numbers_are_refused(tmp_path: Path, key: str, kind: str) -> None:
    """Arrays compare as arrays: taken for numbers, they would raise something else."""
    three_parts(tmp_path)
    wrong, shown = WRONG[kind]
    wrong = len(key).to_bytes(8, "little") + key.encode() + wrong[8 + 3 :]
    right = {name: number(name, UINT16, value) for name, value in (("split.count", 3), ("split.no", 0))}
    path = tmp_path / part_name(1, 3)
    path.write_bytes(gguf_file([*(right | {key: wrong}).values()], [tensor("t1", [4])], bytes(16)))
    assert refusal(path) == f"{path}: {key} is {shown} instead of a whole number; damaged"


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    paths = three_parts(tmp_path)
    os.truncate(paths[1], paths[1].stat().st_size - 20)
    assert refusal(paths[0]).startswith(f"{paths[1]}: tensor t2: its data ends at byte ")
