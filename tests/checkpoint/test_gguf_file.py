"""Reading GGUF: what the `gguf` package wrote is read alike; a header that lies is refused before it is believed."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFEndian, GGUFValueType
from gguf_bytes import (
    ARRAY,
    BOOL,
    F16,
    F32,
    FLOAT32,
    I8,
    INT8,
    INT32,
    Q4_1,
    Q8_0,
    STRING,
    UINT8,
    UINT32,
    UINT64,
    WORDS,
    array,
    entry,
    gguf_file,
    number,
    tensor,
    text,
)

from quantlab.checkpoint import gguf_file as reader
from quantlab.checkpoint.gguf_file import GgufFile
from quantlab.checkpoint.gguf_header import PlannedTensor, serialize_header
from quantlab.checkpoint.gguf_types import element_type
from quantlab.errors import InputError
from quantlab.formats import FORMATS

SCALARS: dict[str, tuple[GGUFValueType, Any]] = {
    "uint8": (GGUFValueType.UINT8, 255),
    "int8": (GGUFValueType.INT8, -128),
    "uint16": (GGUFValueType.UINT16, 65535),
    "int16": (GGUFValueType.INT16, -32768),
    "uint32": (GGUFValueType.UINT32, (1 << 32) - 1),
    "int32": (GGUFValueType.INT32, -(1 << 31)),
    "uint64": (GGUFValueType.UINT64, (1 << 64) - 1),
    "int64": (GGUFValueType.INT64, -(1 << 63)),
    "float32": (GGUFValueType.FLOAT32, float(np.float32(0.1))),
    "float64": (GGUFValueType.FLOAT64, 0.1),
    "true": (GGUFValueType.BOOL, True),
    "false": (GGUFValueType.BOOL, False),
    "text": (GGUFValueType.STRING, "Gr\u00fc\u00dfe \U0001f600\n\0 \u2581"),
    "empty text": (GGUFValueType.STRING, ""),
}
ARRAYS: dict[str, tuple[GGUFValueType, Any]] = {
    "uint8s": (GGUFValueType.UINT8, [0, 255]),
    "int8s": (GGUFValueType.INT8, [-128, 127]),
    "uint16s": (GGUFValueType.UINT16, [0, 65535]),
    "int16s": (GGUFValueType.INT16, [-32768, 7]),
    "uint32s": (GGUFValueType.UINT32, [0, (1 << 32) - 1, 5]),
    "int32s": (GGUFValueType.INT32, [-(1 << 31), 1]),
    "uint64s": (GGUFValueType.UINT64, [(1 << 64) - 1]),
    "int64s": (GGUFValueType.INT64, [-(1 << 63), 0]),
    "float32s": (GGUFValueType.FLOAT32, [0.5, -1.25, float("inf")]),
    "float64s": (GGUFValueType.FLOAT64, [0.1, 1e300]),
    "bools": (GGUFValueType.BOOL, [True, False, True]),
    "texts": (GGUFValueType.STRING, ["", "a", "\u00e9\u0301", "\U0001f600 b", "x" * 300]),
}


def package_writer(path: Path, architecture: str = "llama", **options: Any) -> gguf.GGUFWriter:
    return gguf.GGUFWriter(path, architecture, **options)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def refusal(path: Path) -> str:
    """The line with which a file is refused, without its name."""
    with pytest.raises(InputError) as caught:
        GgufFile(path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value).removeprefix(f"{path}: ")


# What the package writes, we read; what we write, the package reads.


def test_values_are_those_that_the_package_wrote(tmp_path: Path) -> None:
    """Every value type, at the ends of its range; in Python's own types."""
    writer = package_writer(tmp_path / "a.gguf")
    for key, (kind, value) in SCALARS.items():
        writer.add_key_value(key, value, kind)
    finish(writer)
    found = GgufFile(tmp_path / "a.gguf").metadata
    expected = {"general.architecture": "llama"} | {key: value for key, (_, value) in SCALARS.items()}
    assert found == expected
    assert {key: type(value) for key, value in found.items()} == {key: type(value) for key, value in expected.items()}
    theirs = gguf.GGUFReader(tmp_path / "a.gguf").fields
    assert {key: theirs[key].contents() for key in found} == expected
    assert {kind for kind, _ in SCALARS.values()} == set(GGUFValueType) - {GGUFValueType.ARRAY}


def test_arrays_are_those_that_the_package_wrote(tmp_path: Path) -> None:
    """Numbers become numpy arrays of their own type, which may be written into; texts become lists."""
    writer = package_writer(tmp_path / "a.gguf")
    for key, (kind, values) in ARRAYS.items():
        writer.add_key_value(key, values, GGUFValueType.ARRAY, sub_type=kind)
    finish(writer)
    found = GgufFile(tmp_path / "a.gguf").metadata
    theirs = gguf.GGUFReader(tmp_path / "a.gguf").fields
    for key, (kind, values) in ARRAYS.items():
        if kind == GGUFValueType.STRING:
            assert found[key] == values == theirs[key].contents()
        else:
            assert found[key].dtype == gguf.GGUFReader.gguf_scalar_to_np[kind]
            assert found[key].tolist() == values == theirs[key].contents()
            found[key][:] = 0
    assert {kind for kind, _ in ARRAYS.values()} == set(GGUFValueType) - {GGUFValueType.ARRAY}


def test_empty_arrays_are_empty(tmp_path: Path) -> None:
    """The package leaves them out; other writers do not."""
    entries = [array(f"a.{kind}", kind, 0, b"") for kind in (*WORDS, STRING)]
    found = GgufFile(written(tmp_path / "a.gguf", gguf_file(entries))).metadata
    assert [len(value) for value in found.values()] == [0] * 12
    assert found[f"a.{STRING}"] == []


@pytest.mark.parametrize("ahead", range(1, 40, 3))
def test_how_far_is_read_ahead_changes_nothing(tmp_path: Path, ahead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts, numbers and tensors that the buffer's end cuts come out whole."""
    writer = package_writer(tmp_path / "a.gguf")
    for key, (kind, value) in SCALARS.items():
        writer.add_key_value(key, value, kind)
    for key, (kind, values) in ARRAYS.items():
        writer.add_key_value(key, values, GGUFValueType.ARRAY, sub_type=kind)
    writer.add_tensor("a.weight", np.ones((3, 4), np.float32))
    finish(writer)
    whole = GgufFile(tmp_path / "a.gguf")
    monkeypatch.setattr(reader, "READ_AHEAD", ahead)
    pieces = GgufFile(tmp_path / "a.gguf")
    assert str(pieces.metadata) == str(whole.metadata)
    assert pieces.entries == whole.entries


def test_every_element_type_has_the_packages_sizes() -> None:
    """All that the package knows, and no number beside them."""
    known = {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()}
    for kind in range(300):
        found = element_type(kind)
        assert (found is None) == (kind not in known), kind
        if found is not None:
            assert (found.number, found.block_size, found.block_bytes) == (kind, *known[kind])
            assert found.word.lower() == GGMLQuantizationType(kind).name.lower()
            assert found.is_plain == (found.block_size == 1)


@pytest.mark.parametrize("kind", GGMLQuantizationType, ids=lambda kind: kind.name)
def test_tensors_are_those_that_the_package_wrote(tmp_path: Path, kind: GGMLQuantizationType) -> None:
    """Shape, bytes and place for every element type; two of them, the second not where the first one's data end."""
    size, nbytes = GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(0, 256, (3, 2 * nbytes), np.uint8)
    writer = package_writer(tmp_path / "a.gguf")
    writer.add_tensor("blk.0.a.weight", raw, raw_dtype=kind)
    writer.add_tensor("b.weight", raw[:1].copy(), raw_dtype=kind)
    finish(writer)
    file = GgufFile(tmp_path / "a.gguf")
    theirs = {found.name: found for found in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    assert list(file.entries) == list(theirs) == ["blk.0.a.weight", "b.weight"]
    assert file.entries["blk.0.a.weight"].shape == (3, 2 * size)
    for name, rows in (("blk.0.a.weight", raw), ("b.weight", raw[:1])):
        found, their = file.entries[name], theirs[name]
        assert (found.name, found.type.number, found.offset) == (name, int(kind), their.data_offset)
        assert found.shape == tuple(their.shape.tolist()[::-1])
        assert found.nbytes == their.n_bytes == rows.size
        assert file.read(name).tobytes() == rows.tobytes() == their.data.tobytes()


@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 4), (2, 1, 3, 4)])
def test_shapes_have_rows_first(tmp_path: Path, shape: tuple[int, ...]) -> None:
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    writer = package_writer(tmp_path / "a.gguf")
    writer.add_tensor("a", values)
    finish(writer)
    file = GgufFile(tmp_path / "a.gguf")
    assert file.entries["a"].shape == shape
    assert np.array_equal(file.read("a").view(np.float32).reshape(shape), values)


@pytest.mark.parametrize("alignment", [8, 32, 64, 4096])
def test_other_alignments_are_kept(tmp_path: Path, alignment: int) -> None:
    writer = package_writer(tmp_path / "a.gguf")
    writer.add_custom_alignment(alignment)
    arrays = {f"t{n}": np.full(n + 1, n, np.int8) for n in range(4)}
    for name, values in arrays.items():
        writer.add_tensor(name, values)
    finish(writer)
    file = GgufFile(tmp_path / "a.gguf")
    theirs = {found.name: found.data_offset for found in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    assert {name: found.offset for name, found in file.entries.items()} == theirs
    assert {found.offset % alignment for found in file.entries.values()} == {0}
    for name, values in arrays.items():
        assert np.array_equal(file.read(name).view(np.int8), values)


def test_alignment_one_is_none(tmp_path: Path) -> None:
    """Tensors may lie at any byte."""
    entries = [number("general.alignment", UINT32, 1)]
    tensors = [tensor("a", [3], I8, 0), tensor("b", [2], I8, 3)]
    path = written(tmp_path / "a.gguf", gguf_file(entries, tensors, b"12345", alignment=1))
    assert GgufFile(path).read("b").tobytes() == b"45"


@pytest.mark.parametrize("version", [2, 3])
def test_both_versions_are_read(tmp_path: Path, version: int) -> None:
    """Their little-endian forms differ in the number alone, to the package too."""
    writer = package_writer(tmp_path / "a.gguf")
    writer.add_tensor("a", np.arange(4, dtype=np.float32))
    finish(writer)
    content = (tmp_path / "a.gguf").read_bytes()
    path = written(tmp_path / "b.gguf", content[:4] + struct.pack("<I", version) + content[8:])
    assert GgufFile(path).read("a").view(np.float32).tolist() == [0, 1, 2, 3]
    assert gguf.GGUFReader(path).tensors[0].data.tolist() == [0, 1, 2, 3]


def test_a_header_alone_is_a_file(tmp_path: Path) -> None:
    """Vocabularies come without tensors, the first of several files too; padded or not."""
    writer = package_writer(tmp_path / "a.gguf")
    finish(writer)
    assert GgufFile(tmp_path / "a.gguf").entries == {}
    content = gguf_file([number("n", UINT8, 1)])
    for kept in (len(content), 24 + len(number("n", UINT8, 1))):
        assert GgufFile(written(tmp_path / "b.gguf", content[:kept])).metadata == {"n": 1}


def test_the_padding_behind_the_last_tensor_may_be_missing(tmp_path: Path) -> None:
    content = gguf_file([], [tensor("a", [5], I8)], b"quant")
    assert GgufFile(written(tmp_path / "a.gguf", content)).read("a").tobytes() == b"quant"
    assert GgufFile(written(tmp_path / "a.gguf", content + bytes(27))).read("a").tobytes() == b"quant"


METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "a.text": "Gr\u00fc\u00dfe\n",
    "a.count": 7,
    "a.large": 1 << 40,
    "a.largest": (1 << 64) - 1,
    "a.negative": -3,
    "a.very.negative": -(1 << 40),
    "a.share": 0.25,
    "a.flag": True,
    "a.texts": ["", "b", "\U0001f600"],
    "a.numbers": [1, 2, 3],
    "a.mixed": [-1, 2],
    "a.flags": [True, False],
    "a.shares": np.array([0.5, 0.25], np.float32),
    "a.bytes": np.array([1, 2], np.uint8),
}
THEIR_TYPES = {"a.count": "UINT32", "a.large": "UINT64", "a.largest": "UINT64", "a.negative": "INT32",
               "a.very.negative": "INT64", "a.share": "FLOAT32", "a.flag": "BOOL", "a.text": "STRING"}  # fmt: skip


def test_our_header_is_read_by_the_package(tmp_path: Path) -> None:
    """Values, their types, and where tensors lie; by our own reader alike."""
    q4_1 = FORMATS["q4_1"].ggml_type
    planned = [PlannedTensor("a.weight", 0, (2, 3), 24), PlannedTensor("b.weight", q4_1, (2, 64), 80, offset=32)]
    header = serialize_header(METADATA, planned)
    assert len(header.content) % 32 == 0
    path = written(
        tmp_path / "a.gguf", header.content + np.arange(6, dtype=np.float32).tobytes() + bytes(8) + bytes(80)
    )
    theirs, ours = gguf.GGUFReader(path), GgufFile(path)
    for key, value in METADATA.items():
        expected = value.tolist() if isinstance(value, np.ndarray) else value
        assert theirs.fields[key].contents() == expected
        found = ours.metadata[key]
        assert (found.tolist() if isinstance(found, np.ndarray) else found) == expected
    for key, kind in THEIR_TYPES.items():
        assert theirs.fields[key].types == [GGUFValueType[kind]]
    assert (
        theirs.fields["a.numbers"].types == theirs.fields["a.mixed"].types == [GGUFValueType.ARRAY, GGUFValueType.INT32]
    )
    assert theirs.fields["a.bytes"].types == [GGUFValueType.ARRAY, GGUFValueType.UINT8]
    assert [(found.name, found.shape.tolist()) for found in theirs.tensors] == [
        ("a.weight", [3, 2]),
        ("b.weight", [64, 2]),
    ]
    assert theirs.tensors[0].data.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert [found.data_offset for found in theirs.tensors] == [found.offset for found in ours.entries.values()]


def test_a_header_tells_where_its_values_lie() -> None:
    """So that a writer can fill them in later."""
    header = serialize_header(METADATA, [])
    for key, value in (("a.text", METADATA["a.text"].encode()), ("a.count", b"\7\0\0\0"), ("a.bytes", b"\1\2")):
        start = header.value_offsets[key]
        assert header.content[start : start + len(value)] == value
    assert header.value_offsets.keys() == METADATA.keys()


USUAL_TYPES = """
import sys
from pathlib import Path
from quantlab.checkpoint.gguf_file import GgufFile

GgufFile(Path(sys.argv[1])).read("t0")
assert not {"torch", "transformers", "gguf"} & set(sys.modules), sorted(sys.modules)
"""


def test_usual_types_need_no_heavy_import(tmp_path: Path) -> None:
    """Neither torch nor the `gguf` package, which is slow to import."""
    kinds = [F32, F16, Q8_0, *(format.ggml_type for format in FORMATS.values())]
    tensors, data = [], b""
    for place, kind in enumerate(kinds):
        size, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        tensors.append(tensor(f"t{place}", [size], kind, len(data)))
        data += bytes(nbytes) + bytes(-nbytes % 32)
    path = written(tmp_path / "a.gguf", gguf_file([], tensors, data))
    subprocess.run([sys.executable, "-c", USUAL_TYPES, str(path)], check=True, timeout=60)


def test_a_read_is_a_fresh_array(tmp_path: Path) -> None:
    file = GgufFile(written(tmp_path / "a.gguf", gguf_file([], [tensor("a", [4], I8)], b"\0\1\2\3")))
    file.read("a")[:] = 9
    assert file.read("a").tolist() == [0, 1, 2, 3]


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the system does not count the bytes a process reads")
def test_opening_reads_the_header_only_and_a_read_one_tensor(tmp_path: Path) -> None:
    """A sparse file of 200 GB: its header is read, then 5 bytes at its end."""
    size = 200_000_000_000
    assert size % 32 == 0
    head = gguf_file([], [tensor("large", [size], I8), tensor("last", [5], I8, size)])
    path = written(tmp_path / "a.gguf", head)
    os.truncate(path, len(head) + size)
    with path.open("ab") as stream:
        stream.write(b"quant")
    before = bytes_read()
    file = GgufFile(path)
    assert file.entries["large"].nbytes == size
    assert file.read("last").tobytes() == b"quant"
    assert bytes_read() - before < 2 * reader.READ_AHEAD


def bytes_read() -> int:
    """By this process so far."""
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counts["rchar"])


# What is refused.


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
        ({"tensor_count": 1}, "claims 1 tensors in 32 bytes; damaged or cut short"),
        ({"tensor_count": (1 << 64) - 1}, "claims 18446744073709551615 tensors in 32 bytes; damaged or cut short"),
        ({"entry_count": 1}, "claims 1 metadata entries in 32 bytes; damaged or cut short"),
        ({"entry_count": 1 << 63}, "claims 9223372036854775808 metadata entries in 32 bytes; damaged or cut short"),
    ],
    ids=range(11),
)
def test_a_wrong_beginning_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    assert refusal(written(tmp_path / "a.gguf", gguf_file(**change))).startswith(message)


def test_a_big_endian_file_is_refused_as_such(tmp_path: Path) -> None:
    writer = package_writer(tmp_path / "a.gguf", endianess=GGUFEndian.BIG)
    finish(writer)
    assert refusal(tmp_path / "a.gguf").startswith("is big-endian, and little-endian versions 2 and 3 are read")


def test_counts_beyond_any_model_are_refused_in_a_file_that_has_room(tmp_path: Path) -> None:
    """Each item would take many times its bytes in memory."""
    for counts in ({"tensor_count": reader.MAX_COUNT + 1}, {"entry_count": reader.MAX_COUNT + 1}):
        path = written(tmp_path / "a.gguf", gguf_file(**counts))
        os.truncate(path, 1 << 30)
        assert "in 1073741824 bytes; damaged or cut short" in refusal(path)


LEFT = "damaged or cut short"


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
        (tensor("t", [1 << 62, 4]), "tensor t: its data ends at byte {endless} of {size}; the file is cut short"),
        (tensor("t", [1 << 32, 1 << 32]), "tensor t: its data ends at byte {endless} of {size}; the file is cut short"),
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
        (tensor("t", [9]), "tensor t: its data ends at byte {next} of {size}; the file is cut short"),
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
