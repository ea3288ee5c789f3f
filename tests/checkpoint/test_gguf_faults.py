"""GGUF files that are damaged or lie: each fault is one line that names it, and nothing is believed before."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import gguf
import pytest
from gguf.constants import GGUFEndian
from gguf_bytes import (
    ARRAY,
    BOOL,
    F16,
    FLOAT32,
    I8,
    INT8,
    INT32,
    Q4_1,
    STRING,
    UINT8,
    UINT32,
    UINT64,
    array,
    entry,
    gguf_file,
    number,
    tensor,
    text,
)

from quantlab.checkpoint import gguf_file as reader
from quantlab.checkpoint.gguf_file import GgufFile
from quantlab.errors import InputError

LEFT = "damaged or cut short; download it again"
CUT = "the file is cut short; download it again"


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def refusal(path: Path) -> str:
    """The line with which a file is refused, without its name."""
    with pytest.raises(InputError) as caught:
        GgufFile(path)
    assert str(caught.value).isprintable()
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value).removeprefix(f"{path}: ")


@pytest.mark.parametrize("size", [0, 1, 4, 23])
def test_a_file_without_room_for_its_counts_is_refused(tmp_path: Path, size: int) -> None:
    path = written(tmp_path / "a.gguf", gguf_file()[:size])
    assert refusal(path) == f"{size} bytes are no GGUF file; download it again"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"magic": b"GGML"}, "begins with b'GGML' instead of b'GGUF'; not a GGUF file"),
        ({"magic": b"\x80\0\0\0"}, r"begins with b'\x80\x00\x00\x00' instead of b'GGUF'; not a GGUF file"),
        ({"magic": b"FUGG"}, "begins with b'FUGG' instead of b'GGUF'; not a GGUF file"),
        ({"version": 0}, "has GGUF version 0, and little-endian versions 2 and 3 are read; convert the model again"),
        ({"version": 1}, "has GGUF version 1, and little-endian versions 2 and 3 are read; convert the model again"),
        ({"version": 4}, "has GGUF version 4, and little-endian versions 2 and 3 are read; convert the model again"),
        ({"version": (1 << 32) - 1}, "has GGUF version 4294967295, and little-endian versions 2 and 3 are read"),
        ({"tensor_count": 1}, f"claims 1 tensors in 32 bytes; {LEFT}"),
        ({"tensor_count": (1 << 64) - 1}, f"claims 18446744073709551615 tensors in 32 bytes; {LEFT}"),
        ({"entry_count": 1}, f"claims 1 metadata entries in 32 bytes; {LEFT}"),
        ({"entry_count": 1 << 63}, f"claims 9223372036854775808 metadata entries in 32 bytes; {LEFT}"),
    ],
    ids=range(11),
)
def test_a_wrong_beginning_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    assert refusal(written(tmp_path / "a.gguf", gguf_file(**change))).startswith(message)


def test_a_big_endian_file_is_refused_as_such(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama", endianess=GGUFEndian.BIG)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert refusal(tmp_path / "a.gguf").startswith("is big-endian, and little-endian versions 2 and 3 are read")


def test_counts_beyond_any_model_are_refused_in_a_file_that_has_room(tmp_path: Path) -> None:
    """Each item would take many times its bytes in memory."""
    for counts in ({"tensor_count": reader.MAX_COUNT + 1}, {"entry_count": reader.MAX_COUNT + 1}):
        path = written(tmp_path / "a.gguf", gguf_file(**counts))
        os.truncate(path, 1 << 30)
        assert "in 1073741824 bytes; damaged or cut short; download it again" in refusal(path)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([text("a", 1 << 40) + bytes(32)], "a metadata key is 1099511627776 bytes long; damaged"),
        ([text("a", 65536) + bytes(32)], "a metadata key is 65536 bytes long; damaged"),
        ([text("a", 4000) + bytes(32)], "a metadata key claims 4000 bytes where 33 are left; " + LEFT),
        ([entry(b"\xff\xfe", UINT8, b"\1")], "a metadata key is no UTF-8 text; damaged"),
        ([entry("k", 13, b"\0" * 8)], "metadata 'k' has the unknown value type 13; damaged"),
        ([entry("k", (1 << 32) - 1, b"\0" * 8)], "metadata 'k' has the unknown value type 4294967295; damaged"),
        ([entry("k\n\x1b[2J", 13, b"\0" * 8)], r"metadata 'k\n\x1b[2J' has the unknown value type 13; damaged"),
        ([entry("k", STRING, text(b"\xc3\x28"))], "metadata 'k' is no UTF-8 text; damaged"),
        ([entry("k", STRING, text("abc", 1 << 63))], "metadata 'k' claims 9223372036854775808 bytes where"),
        ([entry("k", STRING, text("abc", (1 << 64) - 1))], "metadata 'k' claims 18446744073709551615 bytes where"),
        ([entry("k", BOOL, b"\2")], "metadata 'k' is neither true nor false; damaged"),
        ([array("k", BOOL, 3, b"\1\0\xff")], "metadata 'k' is neither true nor false; damaged"),
        (
            [array("k", ARRAY, 1, struct.pack("<IQ", UINT8, 0))],
            "metadata 'k' is an array of arrays, which no model has",
        ),
        ([array("k", 13, 1, b"\0" * 8)], "metadata 'k' has the unknown value type 13; damaged"),
        ([array("k", UINT8, 1 << 60, b"")], "metadata 'k' claims 1152921504606846976 bytes where"),
        ([array("k", UINT64, (1 << 61) + 1, b"\0" * 8)], "metadata 'k' claims 18446744073709551624 bytes where"),
        ([array("k", FLOAT32, 9, b"\0" * 35)], "metadata 'k' claims 36 bytes where 35 are left; " + LEFT),
        ([array("k", STRING, 1 << 60, b"")], "metadata 'k' claims 9223372036854775808 bytes where"),
        (
            [array("k", STRING, 3, text("a") + text("b"))],
            "metadata 'k' claims 24 bytes where 18 are left; " + LEFT,
        ),
        ([array("k", STRING, 2, text("a") + text("b", 9))], "metadata 'k' claims 9 bytes where 1 are left; " + LEFT),
        ([array("k", STRING, 2, text("a") + text(b"\xff"))], "metadata 'k' is no UTF-8 text; damaged"),
        ([number("a", UINT8, 1), number("a", INT8, 2)], "metadata key 'a' is there twice; damaged"),
        ([number("general.alignment", UINT32, 0)], "general.alignment is 0, which is no power of two; damaged"),
        ([number("general.alignment", UINT32, 24)], "general.alignment is 24, which is no power of two; damaged"),
        ([number("general.alignment", INT32, -32)], "general.alignment is -32, which is no power of two; damaged"),
        ([number("general.alignment", UINT64, 1 << 63)], "general.alignment is 9223372036854775808, which"),
        ([number("general.alignment", FLOAT32, 32)], "general.alignment is 32.0, which is no power of two; damaged"),
        ([number("general.alignment", BOOL, True)], "general.alignment is True, which is no power of two; damaged"),
        ([entry("general.alignment", STRING, text("32"))], "general.alignment is '32', which is no power of two"),
        ([array("general.alignment", UINT32, 1, b" \0\0\0")], "general.alignment is array([32], dtype=uint32), which"),
    ],
    ids=range(30),
)
def test_wrong_metadata_are_refused(tmp_path: Path, entries: list[bytes], message: str) -> None:
    """Whatever is claimed, the line says so and names the key."""
    content = gguf_file(entries, alignment=1)
    assert refusal(written(tmp_path / "a.gguf", content)).startswith(message)


MOST = (1 << 64) - 1


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (text("a", 70000) + bytes(99), "a tensor name is 70000 bytes long; damaged"),
        (text("a", 4000) + bytes(99), "a tensor name claims 4000 bytes where"),
        (tensor(b"\xffname", [4]), "a tensor name is no UTF-8 text; damaged"),
        (tensor("", [4]), "tensor name '' is not 1 to 1024 printable characters; damaged"),
        (tensor("a" * 1025, [4]), f"tensor name '{'a' * 99}' is not 1 to 1024 printable characters; damaged"),
        (tensor("a\nb", [4]), r"tensor name 'a\nb' is not 1 to 1024 printable characters; damaged"),
        (tensor("a\x1b[31mb", [4]), r"tensor name 'a\x1b[31mb' is not 1 to 1024 printable characters; damaged"),
        (tensor("a\u202eb", [4]), r"tensor name 'a\u202eb' is not 1 to 1024 printable characters; damaged"),
        (tensor("a\u200bb", [4]), r"tensor name 'a\u200bb' is not 1 to 1024 printable characters; damaged"),
        (tensor("a\0b", [4]), r"tensor name 'a\x00b' is not 1 to 1024 printable characters; damaged"),
        (tensor("t", [4], dimensions=0), "tensor t: has 0 dimensions; 1 to 4 are possible"),
        (tensor("t", [4], dimensions=5), "tensor t: has 5 dimensions; 1 to 4 are possible"),
        (tensor("t", [4], dimensions=(1 << 32) - 1), "tensor t: has 4294967295 dimensions; 1 to 4 are possible"),
        (tensor("t", [0]), "tensor t: shape [0] is impossible; damaged"),
        (tensor("t", [4, 0]), "tensor t: shape [0, 4] is impossible; damaged"),
        (tensor("t", [MOST]), f"tensor t: shape [{MOST}] is impossible; damaged"),
        (tensor("t", [1 << 63, 2]), f"tensor t: shape [2, {1 << 63}] is impossible; damaged"),
        (tensor("t", [1 << 62, 4]), "tensor t: its data ends at byte {endless} of {size}; " + CUT),
        (tensor("t", [1 << 32, 1 << 32]), "tensor t: its data ends at byte {endless} of {size}; " + CUT),
        (tensor("t", [4], kind=4), "tensor t: unknown element type 4; damaged, or newer than this program"),
        (tensor("t", [4], kind=5), "tensor t: unknown element type 5; damaged, or newer than this program"),
        (tensor("t", [4], kind=999), "tensor t: unknown element type 999; damaged, or newer than this program"),
        (tensor("t", [4], kind=(1 << 32) - 1), "tensor t: unknown element type 4294967295; damaged"),
        (tensor("t", [33], Q4_1), "tensor t: rows of 33 are no whole q4_1 blocks; damaged"),
        (tensor("t", [4], kind=12), "tensor t: rows of 4 are no whole q4_k blocks; damaged"),
        (tensor("t", [4], offset=4), "tensor t: offset 4 is no multiple of the alignment, 32; damaged"),
        (tensor("t", [4], offset=MOST), f"tensor t: offset {MOST} is no multiple of the alignment, 32; damaged"),
        (tensor("t", [4], offset=MOST - 31), f"tensor t: a gap of {MOST - 31} bytes before it; damaged"),
        (tensor("t", [4], offset=32), "tensor t: a gap of 32 bytes before it; damaged"),
        (tensor("t", [9]), "tensor t: its data ends at byte {next} of {size}; " + CUT),
    ],
    ids=range(30),
)
def test_a_wrong_tensor_is_refused_by_name(tmp_path: Path, item: bytes, message: str) -> None:
    """In a file with 32 bytes of data."""
    content = gguf_file([], [item], bytes(32))
    size = len(content)
    expected = message.format(size=size, next=size + 4, endless=size - 32 + (1 << 66))
    assert refusal(written(tmp_path / "a.gguf", content)).startswith(expected)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (tensor("b", [8]), "tensors a and b overlap; the header is damaged"),
        (tensor("b", [1], offset=32), "tensors a and b overlap; the header is damaged"),
        (tensor("b", [8], offset=128), "tensor b: a gap of 64 bytes before it; damaged"),
        (tensor("a", [8], offset=64), "tensor a is there twice; damaged"),
        (tensor("b", [8], offset=64), "32 bytes at its end belong to no tensor; damaged"),
    ],
    ids=["same place", "overlap", "gap", "same name", "rest"],
)
def test_tensors_that_do_not_follow_one_another_are_refused(tmp_path: Path, second: bytes, message: str) -> None:
    """The first has 36 bytes, padded to 64."""
    path = written(tmp_path / "a.gguf", gguf_file([], [tensor("a", [9]), second], bytes(128)))
    assert refusal(path) == message


def test_bytes_behind_a_header_without_tensors_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "a.gguf", gguf_file([], [], bytes(5)))
    assert refusal(path) == "5 bytes at its end belong to no tensor; damaged"


def test_a_header_that_never_ends_is_refused(tmp_path: Path) -> None:
    """In a sparse file there is room for any text or array; no model has such ones, and memory would be gone."""
    for claim in (
        entry("k", STRING, text("", 1 << 35)),
        array("k", FLOAT32, 1 << 33, b""),
        array("k", STRING, 1 << 32, b""),
    ):
        path = written(tmp_path / "a.gguf", gguf_file([claim]))
        os.truncate(path, 1 << 40)
        assert refusal(path) == "metadata 'k' goes on beyond 100000000 bytes of header, which no model needs; damaged"


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    """Whichever byte is the last: in counts, texts, arrays, the tensor list, the data; not the padding at the end."""
    entries = [entry("a", STRING, text("b")), array("c", STRING, 2, text("d") + text("e")), number("f", FLOAT32, 1)]
    whole = gguf_file(entries, [tensor("t", [32, 2], Q4_1), tensor("u", [3], F16, 64)], bytes(70))
    GgufFile(written(tmp_path / "whole.gguf", whole))
    for length in range(len(whole)):
        assert refusal(written(tmp_path / "cut.gguf", whole[:length]))


def test_a_file_cut_while_it_is_open_is_an_error_of_the_tensor(tmp_path: Path) -> None:
    content = gguf_file([], [tensor("a", [8]), tensor("b", [8], offset=32)], bytes(64))
    path = written(tmp_path / "a.gguf", content)
    file = GgufFile(path)
    os.truncate(path, len(content) - 4)
    assert file.read("a").nbytes == 32
    with pytest.raises(InputError, match=f"{path}: ends in the middle of tensor b; the file was cut while open"):
        file.read("b")


def test_a_file_that_grows_while_it_is_open_stays_what_it_was(tmp_path: Path) -> None:
    path = written(tmp_path / "a.gguf", gguf_file([], [tensor("a", [5], I8)], b"quant"))
    file = GgufFile(path)
    with path.open("ab") as stream:
        stream.write(bytes(1000))
    assert file.read("a").tobytes() == b"quant"


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="the system does not list open files")
def test_files_are_closed_once(tmp_path: Path) -> None:
    """A refused one at once, another when asked or forgotten; never a second time, when others have its number."""
    refused = written(tmp_path / "refused.gguf", b"damaged" * 9)
    good = written(tmp_path / "good.gguf", gguf_file())
    with pytest.raises(InputError) as caught:
        GgufFile(refused)
    file, forgotten = GgufFile(good), GgufFile(good)
    file.close()
    del forgotten
    targets = {str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.exists()}
    assert not {str(refused), str(good)} & targets
    others = [os.open(tmp_path, os.O_RDONLY) for _ in range(4)]  # these take the numbers that became free
    file.close()
    del caught, file
    for descriptor in others:
        os.close(descriptor)  # raises OSError where somebody else closed it before
