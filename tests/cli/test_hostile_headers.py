"""Headers and pickles that lie, through the real commands: status 2, one line on stderr that names file and fault."""

from __future__ import annotations

import json
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile_models import READERS, RUNNERS, Run, change_config, copy_of
from safetensors.numpy import save_file

from quantlab import cli
from quantlab.checkpoint.export import export_checkpoint

DAMAGED_OR_CODE = "damaged, or holds more than tensors, which could run code; get it, or save it again, as safetensors"


@pytest.fixture(scope="module")
def gguf_model(llama_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama as one GGUF file."""
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    export_checkpoint(llama_model, path, "gguf")
    return path


def change_header(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Rewrite the header of a folder's safetensors file; the data stay."""
    file = folder / "model.safetensors"
    content = file.read_bytes()
    end = 8 + struct.unpack_from("<Q", content)[0]
    header = json.loads(content[8:end])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[end:])
    return file


# safetensors


def entry(**values: object) -> Callable[[dict[str, Any]], object]:
    return lambda header: header["model.norm.weight"].update(values)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (entry(dtype="Q9"), "tensor model.norm.weight: unknown element type 'Q9'"),
        (entry(dtype="F64"), "tensor model.norm.weight: 256 bytes for F64 [64], which needs 512"),
        (entry(shape=[-64]), "tensor model.norm.weight: shape or offsets are no non-negative whole numbers"),
        (entry(shape=[64.0]), "tensor model.norm.weight: shape or offsets are no non-negative whole numbers"),
        (entry(shape=[True] * 64), "tensor model.norm.weight: shape or offsets are no non-negative whole numbers"),
        (entry(shape=[10**4000] * 2), "tensor model.norm.weight: shape [1000"),
        (entry(data_offsets=[0, 256]), "tensors model."),
        (entry(data_offsets=[1 << 62, (1 << 62) + 256]), "tensor model.norm.weight: its data ends at byte 46116"),
        (lambda header: header.pop("model.norm.weight"), "256 bytes at its end belong to no tensor; damaged"),
        (lambda header: header.update({"a\n\x1b[2J": 1}), r"tensor name 'a\n\x1b[2J' is not 1 to 1024 printable"),
        (lambda header: header.clear(), "378112 bytes at its end belong to no tensor; damaged"),
    ],
    ids=range(11),
)
def test_a_safetensors_header_that_lies(
    refusals: Run, llama_model: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object], fault: str
) -> None:
    folder = copy_of(llama_model, tmp_path / "model")
    file = change_header(folder, change)
    line = refusals(folder)
    assert line.startswith(f"{file}: {fault}")
    assert len(line) < 1000


def test_safetensors_that_are_none(refusals: Run, llama_model: Path, tmp_path: Path) -> None:
    """Empty, cut, something else, a header without end, a file without tensors."""
    folder = copy_of(llama_model, tmp_path / "model")
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for content in (b"", whole[:7], whole[:500], whole[:-1], b"GGUF" + whole, b"\xff" * 100, struct.pack("<Q", 0)):
        file.write_bytes(content)
        assert refusals(folder).startswith(f"{file}: ")
    save_file({}, file)
    assert refusals(folder, *RUNNERS).endswith("num_hidden_layers is 2, and the files hold 0 tensors in all")


def test_inspect_shows_names_as_they_are(
    llama_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Square brackets and colons are no markup, and an architecture that is no class name is not shown."""
    folder = copy_of(llama_model, tmp_path / "model")
    change_config(folder, architectures=["\x1b]0;owned\x07"])
    change_header(folder, lambda header: header.update({"[/b]:smile:": header.pop("model.norm.weight")}))
    monkeypatch.setattr(sys, "argv", ["quantlab", "inspect", str(folder)])
    assert cli._run() == 0
    out = capsys.readouterr().out
    assert "[/b]:smile:" in out
    assert "llama: 0.1 M parameters" in out
    assert out.replace("\n", "").isprintable()


# .bin files


class Payload:
    """Unpickled as code, it makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[list[str]]]:
        return subprocess.check_call, (["touch", str(self.target)],)


@pytest.mark.parametrize("form", ["pickle", "zip archive", "from before torch 1.6", "shard"])
def test_no_pickle_is_executed(refusals: Run, llama_model: Path, tmp_path: Path, form: str) -> None:
    """By no command and in no form; the same bytes do execute where a reader trusts them."""
    folder, target = copy_of(llama_model, tmp_path / "model"), tmp_path / "executed"
    (folder / "model.safetensors").unlink()
    file = folder / ("shard-1.bin" if form == "shard" else "pytorch_model.bin")
    content = {"model.norm.weight": torch.ones(2), "payload": Payload(target)}
    if form == "pickle":
        file.write_bytes(pickle.dumps(content["payload"]))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=form != "from before torch 1.6")
    if form == "shard":
        index = {"weight_map": {"model.norm.weight": file.name}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert refusals(folder) == f"{file}: {DAMAGED_OR_CODE}"
    assert not target.exists()
    if form == "pickle":
        pickle.loads(file.read_bytes())
        assert target.exists()


# GGUF

Change = Callable[[bytes], bytes]
NORM = "output_norm.weight"


def put(at: int, new: bytes) -> Change:
    """Other bytes at this place."""
    return lambda content: content[:at] + new + content[at + len(new) :]


def value(key: str, new: bytes) -> Change:
    """Another value of a metadata key, of the same size."""
    name = struct.pack("<Q", len(key)) + key.encode()
    return lambda content: put(content.index(name) + len(name) + 4, new)(content)


def layout(skip: int, word: str, number: int) -> Change:
    """Another number in the entry of the last norm: 0 dimensions, 4 size, 12 element type, 16 offset."""
    name = struct.pack("<Q", len(NORM)) + NORM.encode()
    return lambda content: put(content.index(name) + len(name) + skip, struct.pack(word, number))(content)


LIES: dict[str, tuple[Change, str]] = {
    "magic": (put(0, b"GGML"), "begins with b'GGML' instead of b'GGUF'; not a GGUF file"),
    "version": (put(4, b"\1\0\0\0"), "has GGUF version 1, and little-endian versions 2 and 3 are read; convert "),
    "byte order": (put(4, b"\0\0\0\3"), "is big-endian, and little-endian versions 2 and 3 are read; convert "),
    "tensors": (put(8, b"\xff" * 8), "claims 18446744073709551615 tensors in "),
    "entries": (put(16, b"\0" * 7 + b"\x80"), "claims 9223372036854775808 metadata entries in "),
    "key": (put(24, b"\xff" * 8), "a metadata key is 18446744073709551615 bytes long; damaged"),
    "cut header": (lambda content: content[:1000], "a metadata key claims 26 bytes where 1 are left; damaged or cut"),
    "cut data": (lambda content: content[:-100], f"tensor {NORM}: its data ends at byte 392064 of 391964"),
    "rest": (lambda content: content + b"1", "1 bytes at its end belong to no tensor; damaged"),
    "family": (
        value("general.architecture", b"\5" + b"\0" * 7 + b"bert!"),
        "general.architecture is 'bert!'; supported: ",
    ),
    "text": (value("general.architecture", b"\5" + b"\0" * 7 + b"\xff"), "metadata 'general.architecture' is no UTF-8"),
    "billions of layers": (value("llama.block_count", b"\0\0\0\x80"), "llama.block_count is 2147483648 instead of "),
    "layers": (value("llama.block_count", b"\3\0\0\0"), "llama.block_count is 3 instead of 2, the number of layers "),
    "width": (value("llama.embedding_length", b"\x20\0\0\0"), "tensor token_embd.weight is [512, 64] instead of "),
    "heads": (value("llama.attention.head_count", bytes(4)), "llama.attention.head_count is 0 instead of "),
    "dimensions": (layout(0, "<I", 9), f"tensor {NORM}: has 9 dimensions; 1 to 4 are possible"),
    "zero": (layout(4, "<Q", 0), f"tensor {NORM}: shape [0] is impossible; damaged"),
    "size": (layout(4, "<Q", 1 << 62), f"tensor {NORM}: its data ends at byte 18446744073"),
    "shorter": (layout(4, "<Q", 8), "224 bytes at its end belong to no tensor; damaged"),
    "unknown type": (layout(12, "<I", 77), f"tensor {NORM}: unknown element type 77; damaged, or newer than "),
    "wrong type": (layout(12, "<I", 26), f"tensor {NORM}: holds I32 numbers; weights are F32, F16, BF16 or blocks"),
    "offset": (layout(16, "<Q", 7), f"tensor {NORM}: offset 7 is no multiple of the alignment, 32; damaged"),
    "overlap": (
        layout(16, "<Q", 32),
        "tensors token_embd.weight and output_norm.weight overlap; the header is damaged",
    ),
    "escape": (
        lambda content: content.replace(b"put_norm.w", b"put_\x1b[2J.w"),
        r"tensor name 'output_\x1b[2J.weight' is not 1",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_gguf_header_that_lies(refusals: Run, gguf_model: Path, tmp_path: Path, lie: str) -> None:
    """Commands that read tensors, and those that run the model, refuse the file in the same words."""
    change, fault = LIES[lie]
    file = tmp_path / "model.gguf"
    file.write_bytes(change(gguf_model.read_bytes()))
    assert refusals(file, "inspect", "generate", "quantize").startswith(f"{file}: {fault}")


def with_metadata(content: bytes, **numbers: int) -> bytes:
    """Put whole numbers before the metadata (`__` stands for a dot), and a text that leaves the data where they lie."""
    extra = b""
    for name, value in numbers.items():
        key = name.replace("__", ".").encode()
        extra += struct.pack("<Q", len(key)) + key + struct.pack("<II", 4, value)
    room = -(len(extra) + 23) % 32
    extra += struct.pack("<Q", 3) + b"pad" + struct.pack("<IQ", 8, room) + b"x" * room
    count = struct.unpack_from("<Q", content, 16)[0] + len(numbers) + 1
    return content[:16] + struct.pack("<Q", count) + extra + content[24:]


def test_a_gguf_with_another_alignment_is_refused(refusals: Run, gguf_model: Path, tmp_path: Path) -> None:
    """One that is no power of two, and one that its tensors do not have."""
    file = tmp_path / "model.gguf"
    for alignment, fault in ((24, "general.alignment is 24, which is no power of two; damaged"), (4096, "tensor ")):
        file.write_bytes(with_metadata(gguf_model.read_bytes(), general__alignment=alignment))
        assert refusals(file, *READERS).startswith(f"{file}: {fault}")


def test_a_gguf_that_is_split_wrongly_is_refused(refusals: Run, gguf_model: Path, tmp_path: Path) -> None:
    """A count that is not the name's, a part that is missing, a part that is the first again."""
    split = with_metadata(gguf_model.read_bytes(), split__count=3, split__no=0)
    single = tmp_path / "model.gguf"
    single.write_bytes(split)
    assert refusals(single, *READERS).startswith(f"{single}: split.count is 3, which its name ")
    first, second = (tmp_path / f"model-{part:05}-of-00003.gguf" for part in (1, 2))
    first.write_bytes(split)
    assert refusals(first, *READERS) == f"{first}: its part {second.name} is missing; download it"
    second.symlink_to(first)
    assert refusals(first, *READERS).startswith(f"{second}: is not part 2 of 3, whatever its name says")


def test_a_token_that_is_no_utf8_is_refused(refusals: Run, gguf_model: Path, tmp_path: Path) -> None:
    """Wherever the vocabulary is used or not."""
    content = gguf_model.read_bytes()
    first = content.index(b"tokenizer.ggml.tokens") + len("tokenizer.ggml.tokens") + 4 + 4 + 8 + 8
    file = tmp_path / "model.gguf"
    file.write_bytes(content[:first] + b"\xff" + content[first + 1 :])
    assert refusals(file) == f"{file}: metadata 'tokenizer.ggml.tokens' is no UTF-8 text; damaged"
