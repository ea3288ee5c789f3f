"""GGUF files: what the `gguf` package writes we read, what we write the package reads; values, bytes and places."""

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
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf_bytes import (
    F16,
    F32,
    I8,
    Q8_0,
    STRING,
    UINT8,
    UINT32,
    WORDS,
    array,
    gguf_file,
    number,
    tensor,
)

from quantlab.checkpoint import gguf_file as reader
from quantlab.checkpoint.gguf_file import GgufFile
from quantlab.checkpoint.gguf_header import PlannedTensor, serialize_header
from quantlab.checkpoint.gguf_types import element_type
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


def test_a_name_that_is_no_text_is_written_nevertheless(tmp_path: Path) -> None:
    """Python shows a byte of a path that is no UTF-8 as half of a surrogate pair, which no file can hold."""
    header = serialize_header({"general.name": "caf\udce9", "a.texts": ["\ud800 b"]}, [])
    path = written(tmp_path / "a.gguf", header.content)
    assert GgufFile(path).metadata == {"general.name": "caf?", "a.texts": ["? b"]}


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
