"""Reading safetensors: what the library wrote is read alike, and a damaged header is refused before it is believed."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import save_file

from quantlab.checkpoint.safetensors_file import SafetensorsFile
from quantlab.checkpoint.tensors import DTYPE_BYTES, torch_tensor
from quantlab.errors import InputError

TORCH_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
COMPUTABLE = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")


def tensors_of(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A matrix, a scalar and tensors without elements, of arbitrary bits (0 and 1 where the type is bool)."""
    random = torch.randint(
        0, 2 if dtype == torch.bool else 256, (3 * 5 * 8,), generator=torch.Generator().manual_seed(0)
    )
    numbers = random.to(torch.uint8).view(dtype)[:15]
    return {
        "matrix": numbers.reshape(3, 5).clone(),
        "scalar": numbers[:1].reshape(()).clone(),
        "empty": torch.empty(0, dtype=dtype),
        "no.columns": torch.empty(4, 0, dtype=dtype),
    }


def write(path: Path, header: object, data: bytes = b"") -> Path:
    """A file with this header, JSON unless bytes are given, and these data."""
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(content)) + content + data)
    return path


def field(dtype: object = "U8", shape: object = (4,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_every_element_type_of_the_table_is_tested() -> None:
    assert TORCH_TYPES.keys() == DTYPE_BYTES.keys()


@pytest.mark.parametrize("word", TORCH_TYPES)
def test_entries_and_bytes_are_those_of_the_library(tmp_path: Path, word: str) -> None:
    """Names, element types, shapes and raw bytes of a file that the library wrote."""
    tensors = tensors_of(TORCH_TYPES[word])
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt", "made": "by hand"})
    file = SafetensorsFile(path)
    assert file.metadata == {"format": "pt", "made": "by hand"}
    with safetensors.safe_open(path, "pt") as library:
        assert set(file.entries) == set(library.keys()) == set(tensors)
        for name, entry in file.entries.items():
            theirs = library.get_slice(name)
            assert (entry.name, entry.dtype, entry.shape) == (name, theirs.get_dtype(), tuple(theirs.get_shape()))
            expected = tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes()
            assert file.read(name).tobytes() == expected
            assert entry.nbytes == len(expected)
            assert entry.elements == tensors[name].numel()


@pytest.mark.parametrize("word", COMPUTABLE)
def test_bytes_become_the_tensor_that_was_written(tmp_path: Path, word: str) -> None:
    """Compared by their bits: arbitrary bits also make NaNs."""
    tensors = tensors_of(TORCH_TYPES[word])
    save_file(tensors, tmp_path / "model.safetensors")
    file = SafetensorsFile(tmp_path / "model.safetensors")
    for name, tensor in tensors.items():
        read = torch_tensor(file.read(name), file.entries[name])
        assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(read.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_a_read_is_a_fresh_array(tmp_path: Path) -> None:
    """Writing into it changes neither the file nor the next read."""
    save_file({"a": torch.arange(4, dtype=torch.uint8)}, tmp_path / "a.safetensors")
    file = SafetensorsFile(tmp_path / "a.safetensors")
    file.read("a")[:] = 9
    assert file.read("a").tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("word", sorted(set(DTYPE_BYTES) - set(COMPUTABLE)))
def test_element_types_that_are_never_computed_with_are_refused_by_name(tmp_path: Path, word: str) -> None:
    save_file({"a": torch.zeros(8, dtype=torch.uint8).view(TORCH_TYPES[word])}, tmp_path / "a.safetensors")
    file = SafetensorsFile(tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=f"a: element type {word} is not supported"):
        torch_tensor(file.read("a"), file.entries["a"])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the system does not count the bytes a process reads")
def test_opening_reads_the_header_only_and_a_read_one_tensor(tmp_path: Path) -> None:
    """A sparse file of 200 GB: its header is read, then 5 bytes at its end."""
    size = 200_000_000_000
    header = {"large": field(shape=[size], offsets=[0, size]), "last": field(shape=[5], offsets=[size, size + 5])}
    path = write(tmp_path / "model.safetensors", header)
    start = path.stat().st_size
    os.truncate(path, start + size)
    with path.open("ab") as stream:
        stream.write(b"quant")

    before = bytes_read()
    file = SafetensorsFile(path)
    assert file.entries["large"].nbytes == size
    assert file.read("last").tobytes() == b"quant"
    assert bytes_read() - before < 100_000  # this very measurement reads a little too


def bytes_read() -> int:
    """By this process so far."""
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counts["rchar"])


@pytest.mark.parametrize("size", [0, 1, 7])
def test_a_file_without_room_for_a_header_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(size))
    with pytest.raises(InputError, match=f"{path}: {size} bytes are no safetensors file"):
        SafetensorsFile(path)


@pytest.mark.parametrize("claimed", [3, 100_000_001, 1 << 40, (1 << 64) - 1])
def test_a_header_longer_than_the_file_is_refused_before_it_is_read(tmp_path: Path, claimed: int) -> None:
    """Whatever length is claimed, nothing of that size is allocated."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", claimed) + b"{}")
    with pytest.raises(InputError, match=f"{path}: claims a header of {claimed} bytes in a file of 10"):
        SafetensorsFile(path)


def test_a_header_beyond_the_librarys_limit_is_refused(tmp_path: Path) -> None:
    """100 MB of header: also in a file that is large enough to hold it."""
    path = write(tmp_path / "model.safetensors", b"{}")
    path.write_bytes(struct.pack("<Q", 100_000_001))
    os.truncate(path, 200_000_000)
    with pytest.raises(InputError, match="claims a header of 100000001 bytes"):
        SafetensorsFile(path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"not JSON", "its header is no JSON;"),
        (b"\xff\xfe{}", "its header is no JSON;"),
        (b"", "its header is no JSON;"),
        (b'{"a": {"dtype"', "its header is no JSON;"),
        (b"[" * 50_000, "its header is no JSON;"),
        (b'{"a": ' + b"9" * 5000 + b"}", "its header is no JSON;"),  # beyond Python's limit for whole numbers
        (b"[1, 2]", "its header is no JSON object"),
        (b"null", "its header is no JSON object"),
        (b'"text"', "its header is no JSON object"),
        (b"3", "its header is no JSON object"),
        (b'{"__metadata__": [1]}', "__metadata__ in its header is no JSON object of texts"),
        (b'{"__metadata__": 0}', "__metadata__ in its header is no JSON object of texts"),
        (b'{"__metadata__": {"step": 1}}', "__metadata__ in its header is no JSON object of texts"),
    ],
    ids=range(13),
)
def test_a_header_that_is_no_object_is_refused(tmp_path: Path, header: bytes, message: str) -> None:
    path = write(tmp_path / "model.safetensors", header)
    with pytest.raises(InputError) as caught:
        SafetensorsFile(path)
    assert str(caught.value).startswith(f"{path}: {message}")


NO_NUMBERS = "shape or offsets are no non-negative whole numbers"
CUT = "the file is cut short; download it again"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (None, "its header entry lacks dtype, shape or data_offsets"),
        ([], "its header entry lacks dtype, shape or data_offsets"),
        ({}, "its header entry lacks dtype, shape or data_offsets"),
        ({"dtype": "U8", "shape": [4]}, "its header entry lacks dtype, shape or data_offsets"),
        (field(offsets=4), "its header entry lacks dtype, shape or data_offsets"),
        (field(offsets=[4]), "its header entry lacks dtype, shape or data_offsets"),
        (field(offsets=[0, 2, 4]), "its header entry lacks dtype, shape or data_offsets"),
        (field(dtype="Q4_1"), "unknown element type 'Q4_1'"),
        (field(dtype="u8"), "unknown element type 'u8'"),
        (field(dtype=None), "unknown element type None"),
        (field(dtype=["U8"]), "unknown element type ['U8']"),
        (field(dtype={"U8": 1}), "unknown element type {'U8': 1}"),
        (field(shape=4), NO_NUMBERS),
        (field(shape="4"), NO_NUMBERS),
        (field(shape=None), NO_NUMBERS),
        (field(shape={"4": 4}), NO_NUMBERS),
        (field(shape=[-4]), NO_NUMBERS),
        (field(shape=[-2, -2]), NO_NUMBERS),
        (field(shape=[4.0]), NO_NUMBERS),
        (field(shape=["4"]), NO_NUMBERS),
        (field(shape=[True, 4]), NO_NUMBERS),  # in Python, True is a number
        (field(shape=[[4]]), NO_NUMBERS),
        (field(offsets=[False, 4]), NO_NUMBERS),
        (field(offsets=[-1, 3]), NO_NUMBERS),
        (field(offsets=["0", "4"]), NO_NUMBERS),
        (field(offsets="04"), NO_NUMBERS),
        (field(offsets=[0.0, 4.0]), NO_NUMBERS),
        (field(offsets=[4, 0]), CUT),
        (field(shape=[5], offsets=[0, 5]), CUT),
        (field(offsets=[1 << 64, (1 << 64) + 4]), CUT),
        (field(shape=[1 << 62, 1 << 62], offsets=[0, 1 << 124]), CUT),
        (field(shape=[1 << 63, 2]), "4 bytes for U8 [9223372036854775808, 2], which needs 18446744073709551616"),
        (field(shape=[3]), "4 bytes for U8 [3], which needs 3"),
        (field(shape=[]), "4 bytes for U8 [], which needs 1"),
        (field(shape=[4, 0]), "4 bytes for U8 [4, 0], which needs 0"),
        (field(dtype="F32", shape=[4]), "4 bytes for F32 [4], which needs 16"),
    ],
    ids=range(36),
)
def test_a_wrong_entry_is_refused_with_file_and_tensor(tmp_path: Path, entry: object, message: str) -> None:
    """The file holds four bytes of data; every entry says something of them that cannot be."""
    path = write(tmp_path / "model.safetensors", {"h.0.weight": entry}, b"1234")
    with pytest.raises(InputError) as caught:
        SafetensorsFile(path)
    assert str(caught.value).startswith(f"{path}: tensor h.0.weight: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ([10**4000, 10**4000], "U8"),
        ([1] * 65, "U8"),
        ([1 << 62, 1 << 62, 0], "F32"),
        ([0, 1 << 61], "F64"),
        ([2**65], "U8"),
    ],
    ids=["4000 digits", "65 dimensions", "behind a zero", "before a zero", "65 bits"],
)
def test_shapes_beyond_arithmetic_are_refused(tmp_path: Path, shape: list[int], dtype: str) -> None:
    """Python counts on where others overflow, but does not print numbers without end; the library refuses them too."""
    end = 0 if 0 in shape else 1
    path = write(tmp_path / "model.safetensors", {"a": field(dtype, shape, [0, end])}, bytes(end))
    with pytest.raises(InputError) as caught:
        SafetensorsFile(path)
    assert str(caught.value).startswith(f"{path}: tensor a: shape [")
    assert str(caught.value).endswith("] is impossible; damaged")
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31m", "a\u202eb", "a\0", "", "x" * 1025])
def test_names_that_a_terminal_would_obey_are_refused(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "model.safetensors", {name: field()}, b"1234")
    with pytest.raises(InputError) as caught:
        SafetensorsFile(path)
    assert str(caught.value) == (f"{path}: tensor name {name[:99]!r} is not 1 to 1024 printable characters; damaged")


def test_other_names_are_read(tmp_path: Path) -> None:
    """Blanks, paths and letters of any script: names are no paths, and mean nothing but themselves."""
    names = ["../../etc/passwd", "a b", "[/b]", "gr\u00fc\u00dfe.\u4f60\u597d", "x" * 1024]
    save_file({name: torch.ones(1) for name in names}, tmp_path / "a.safetensors")
    assert set(SafetensorsFile(tmp_path / "a.safetensors").entries) == set(names)


@pytest.mark.parametrize(
    ("header", "key"),
    [
        (
            b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"a":{"dtype":"U8","shape":[2,2],"data_offsets":[0,4]}}',
            "a",
        ),
        (b'{"a":{"dtype":"U8","dtype":"I8","shape":[4],"data_offsets":[0,4]}}', "dtype"),
        (b'{"__metadata__":{"k":"1","k":"2"},"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}', "k"),
    ],
    ids=["tensor", "field", "metadata"],
)
def test_a_key_that_is_there_twice_is_refused(tmp_path: Path, header: bytes, key: str) -> None:
    """One reader would take the first, another the last."""
    path = write(tmp_path / "model.safetensors", header, b"1234")
    with pytest.raises(InputError) as caught:
        SafetensorsFile(path)
    assert str(caught.value) == f"{path}: {key!r} is there twice in its header; damaged"


@pytest.mark.parametrize("text", [b'{"__metadata__":{"k":"\\ud800"}}', b'{"__metadata__":{"k":NaN}}'])
def test_what_only_python_takes_for_json_is_refused(tmp_path: Path, text: bytes) -> None:
    """Half of a surrogate pair, and NaN; whole pairs are text."""
    with pytest.raises(InputError, match="its header is no JSON"):
        SafetensorsFile(write(tmp_path / "model.safetensors", text))
    pair = write(tmp_path / "pair.safetensors", b'{"__metadata__":{"k":"\\ud83d\\ude00"}}')
    assert SafetensorsFile(pair).metadata == {"k": "\U0001f600"}


def test_overlapping_tensors_are_refused_by_name(tmp_path: Path) -> None:
    header = {"b": field(offsets=[2, 6]), "a": field(offsets=[0, 4])}
    path = write(tmp_path / "model.safetensors", header, b"123456")
    with pytest.raises(InputError, match=f"{path}: tensors a and b overlap"):
        SafetensorsFile(path)


def test_a_gap_between_tensors_is_refused(tmp_path: Path) -> None:
    """The format allows none, and the library refuses it as well."""
    header = {"a": field(offsets=[0, 4]), "b": field(offsets=[6, 10])}
    path = write(tmp_path / "model.safetensors", header, b"1234567890")
    with pytest.raises(InputError, match=f"{path}: tensor b: a gap of 2 bytes before it"):
        SafetensorsFile(path)
    with pytest.raises(safetensors.SafetensorError):
        safetensors.safe_open(path, "np").__enter__()


def test_bytes_after_the_last_tensor_are_refused(tmp_path: Path) -> None:
    """The format allows none, and the library refuses them as well."""
    path = write(tmp_path / "model.safetensors", {"a": field()}, b"1234567")
    with pytest.raises(InputError, match=f"{path}: 3 bytes at its end belong to no tensor"):
        SafetensorsFile(path)
    with pytest.raises(safetensors.SafetensorError):
        safetensors.safe_open(path, "np").__enter__()


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    """Whichever byte is the last: in the length, in the header, in the data."""
    whole = tmp_path / "whole.safetensors"
    save_file({"a": torch.arange(16.0), "b": torch.arange(3, dtype=torch.int8)}, whole)
    content = whole.read_bytes()
    path = tmp_path / "cut.safetensors"
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(InputError, match=f"^{path}: "):
            SafetensorsFile(path)


def test_a_file_cut_while_it_is_open_is_an_error_of_the_tensor(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(16.0), "b": torch.arange(16.0)}, path)
    file = SafetensorsFile(path)
    os.truncate(path, path.stat().st_size - 4)
    assert file.read("a").nbytes == 64
    with pytest.raises(InputError, match=f"{path}: ends in the middle of tensor b"):
        file.read("b")


def test_a_file_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.safetensors: cannot be opened: No such file or directory"):
        SafetensorsFile(tmp_path / "none.safetensors")


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="the system does not list open files")
def test_a_refused_file_is_closed_once(tmp_path: Path) -> None:
    """Its descriptor is free for others at once, and is not closed a second time when others have it."""
    path = write(tmp_path / "model.safetensors", b"damaged")
    with pytest.raises(InputError) as caught:
        SafetensorsFile(path)
    targets = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.exists()]
    assert str(path) not in targets
    others = [os.open(tmp_path, os.O_RDONLY) for _ in range(4)]  # these take the numbers that became free
    del caught  # and with it the refused object
    for descriptor in others:
        os.close(descriptor)  # raises OSError where somebody else closed it before
