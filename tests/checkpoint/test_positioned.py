"""Positioned reads: all the bytes or an error; pipes, devices, folders and lies about sizes neither hang nor crash."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from quantlab.checkpoint import positioned
from quantlab.checkpoint.positioned import open_to_read, read_exactly, read_whole, write_all
from quantlab.errors import InputError


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        open_to_read(path)
    assert str(caught.value).isprintable()
    return str(caught.value)


@pytest.fixture
def ten(tmp_path: Path) -> Path:
    path = tmp_path / "ten"
    path.write_bytes(bytes(range(10)))
    return path


def test_any_part_of_a_file_is_read(ten: Path) -> None:
    """Where the descriptor stands neither matters nor changes; every read is a fresh array."""
    descriptor = open_to_read(ten)
    try:
        for offset in range(11):
            for nbytes in range(11 - offset):
                found = read_exactly(descriptor, nbytes, offset, ten, "a tensor")
                assert found.dtype == np.uint8
                assert found.tolist() == list(range(offset, offset + nbytes))
        found[:] = 9
        assert os.lseek(descriptor, 0, os.SEEK_CUR) == 0
        assert read_exactly(descriptor, 1, 9, ten, "a tensor").tolist() == [9]
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("most", [1, 3, 10])
def test_a_read_goes_on_where_the_system_gives_less(ten: Path, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux gives at most 2 GiB at a time, network file systems less."""
    monkeypatch.setattr(positioned, "READ_CHUNK", most)
    descriptor = open_to_read(ten)
    assert read_exactly(descriptor, 10, 0, ten, "a tensor").tolist() == list(range(10))
    os.close(descriptor)


@pytest.mark.parametrize(("nbytes", "offset"), [(11, 0), (1, 10), (5, 6), (1, 1 << 40)])
def test_what_lies_beyond_the_end_is_an_error(ten: Path, nbytes: int, offset: int) -> None:
    descriptor = open_to_read(ten)
    with pytest.raises(InputError) as caught:
        read_exactly(descriptor, nbytes, offset, ten, "tensor x")
    assert str(caught.value) == f"{ten}: ends in the middle of tensor x; the file was cut while open"
    os.close(descriptor)


@pytest.mark.parametrize("nbytes", [1 << 60, 1 << 63, 1 << 80])
def test_what_no_memory_holds_is_an_error(ten: Path, nbytes: int) -> None:
    descriptor = open_to_read(ten)
    with pytest.raises(InputError) as caught:
        read_exactly(descriptor, nbytes, 0, ten, "tensor x")
    assert str(caught.value) == f"{ten}: no memory for the {nbytes} bytes of tensor x; a larger machine is needed"
    os.close(descriptor)


def test_what_the_system_cannot_read_is_an_error(tmp_path: Path) -> None:
    """A folder's descriptor stands for a disk that fails."""
    descriptor = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(InputError) as caught:
        read_exactly(descriptor, 1, 0, tmp_path, "tensor x")
    assert str(caught.value) == f"{tmp_path}: cannot be read at tensor x: Is a directory"
    os.close(descriptor)


NO_FILE = "is a folder, pipe or device where a file should be"


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["folder", "pipe"])
def test_what_is_no_plain_file_is_refused(tmp_path: Path, make: Callable[[Path], object]) -> None:
    """At once, also through a link: nobody waits for somebody to write into the pipe."""
    make(tmp_path / "thing")
    (tmp_path / "link").symlink_to("thing")
    for name in ("thing", "link"):
        assert refusal(tmp_path / name) == f"{tmp_path / name}: {NO_FILE}"


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/null"])
def test_devices_are_refused(device: str) -> None:
    assert refusal(Path(device)) == f"{device}: {NO_FILE}"


def test_a_pipe_that_takes_the_files_place_is_refused(ten: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the first look and the opening; its descriptor is closed again."""
    file_status, opened = ten.stat(), []
    real_open = os.open

    def remember(*arguments: object, **options: object) -> int:
        opened.append(real_open(*arguments, **options))
        return opened[-1]

    ten.unlink()
    os.mkfifo(ten)
    monkeypatch.setattr(Path, "stat", lambda path: file_status)
    monkeypatch.setattr(os, "open", remember)
    found: list[str] = []
    reader = threading.Thread(target=lambda: found.append(refusal(ten)), daemon=True)
    reader.start()
    reader.join(timeout=60)
    assert found == [f"{ten}: {NO_FILE}"]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened[0])


def test_paths_that_lead_nowhere_are_refused(tmp_path: Path) -> None:
    """Missing, a loop of links, a name that is too long, names that no file system has."""
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("missing")
    (tmp_path / "file").touch()
    faults = {
        "missing": "No such file or directory",
        "dangling": "No such file or directory",
        "loop": "Too many levels of symbolic links",
        "file/inside": "Not a directory",
        "n" * 300: "File name too long",
        "a\0b": "embedded null byte",
    }
    for name, fault in faults.items():
        shown = f"{tmp_path}/{name}".replace("\0", r"\x00")
        assert refusal(tmp_path / name) == f"{shown}: cannot be opened: {fault}"
    assert "surrogates not allowed" in refusal(tmp_path / "\ud800")


def test_a_link_to_a_file_is_that_file(ten: Path) -> None:
    """Caches of downloads are full of them."""
    link = ten.with_name("link")
    link.symlink_to(ten)
    descriptor = open_to_read(link)
    assert read_exactly(descriptor, 2, 4, link, "a tensor").tolist() == [4, 5]
    os.close(descriptor)


def test_a_whole_file_is_read_if_it_is_small(ten: Path) -> None:
    """Another is not touched: a sparse one costs its maker nothing."""
    assert read_whole(ten, 10) == bytes(range(10))
    os.truncate(ten, 1 << 40)
    with pytest.raises(InputError) as caught:
        read_whole(ten, (1 << 40) - 1)
    assert str(caught.value) == f"{ten}: has {1 << 40} bytes, too many for such a file; download it again"


def test_writes_go_where_they_should(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole, also where the system takes them in pieces, and beyond what was the end."""
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: real(descriptor, data[:3], offset))
    descriptor = os.open(tmp_path / "file", os.O_CREAT | os.O_RDWR)
    write_all(descriptor, memoryview(bytes(range(10))), 5)
    write_all(descriptor, memoryview(b"ab"), 2)
    os.close(descriptor)
    assert (tmp_path / "file").read_bytes() == b"\0\0ab\0" + bytes(range(10))
