"""GGUF files with mutated headers: each opens, or is refused in one line; memory stays in proportion to the file.

The mutations know the format (counts, lengths, types, sizes and offsets are replaced by numbers that overflow, lie and
repeat), so that most of them get beyond the first check.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gguf_bytes import (
    ARRAY,
    BOOL,
    FLOAT32,
    I8,
    INT32,
    STRING,
    UINT8,
    UINT32,
    WORDS,
    array,
    entry,
    gguf_file,
    number,
    tensor,
    text,
)
from hypothesis import given
from hypothesis import strategies as st
from mutations import BYTES, CASES, NUMBERS, encode, mutated, outcome, read_everything

from quantlab.checkpoint import open_checkpoint
from quantlab.checkpoint.gguf_file import GgufFile
from quantlab.checkpoint.gguf_types import element_type


def blocks(rows: int, block_bytes: int) -> bytes:
    """Rows of one Q8_0 block, or anything else of that size, with finite numbers in them."""
    return (b"\0\x3c" + bytes(range(1, block_bytes - 1))) * rows


def tiny_model(architecture: str) -> bytes:
    """A whole model: one layer, four tokens; the embedding in Q8_0, the norms of a Gemma with 1 added."""
    matrices = {"attn_q": 32, "attn_k": 32, "attn_v": 32, "attn_output": 32, "ffn_gate": 64, "ffn_up": 64}
    shapes = {f"blk.0.{name}.weight": [32, rows] for name, rows in matrices.items()}
    shapes |= {"blk.0.ffn_down.weight": [64, 32], "token_embd.weight": [32, 4]}
    norms = ["attn_norm", "ffn_norm"]
    sizes = {"context_length": 16, "embedding_length": 32, "block_count": 1, "feed_forward_length": 64,
             "attention.head_count": 2, "attention.head_count_kv": 2}  # fmt: skip
    entries = [entry("general.architecture", STRING, text(architecture))]
    entries += [number(f"{architecture}.{key}", UINT32, value) for key, value in sizes.items()]
    entries += [number(f"{architecture}.attention.layer_norm_rms_epsilon", FLOAT32, 1e-5)]
    if architecture == "gemma3":
        norms += ["attn_q_norm", "attn_k_norm", "post_attention_norm", "post_ffw_norm"]
        entries += [number("gemma3.attention.key_length", UINT32, 16), number("gemma3.rope.freq_base", FLOAT32, 1e4)]
        entries += [array("quantlab.norm_residuals", FLOAT32, 192, bytes(4 * 192))]
    shapes |= {f"blk.0.{name}.weight": [16 if "q_norm" in name or "k_norm" in name else 32] for name in norms}
    shapes["output_norm.weight"] = [32]
    entries += [entry("tokenizer.ggml.model", STRING, text("llama"))]
    entries += [array("tokenizer.ggml.tokens", STRING, 4, b"".join(map(text, ("<unk>", "<s>", "</s>", "a"))))]
    entries += [array("tokenizer.ggml.scores", FLOAT32, 4, bytes(16))]
    entries += [array("tokenizer.ggml.token_type", INT32, 4, struct.pack("<4i", 2, 3, 3, 1))]
    entries += [number("tokenizer.ggml.bos_token_id", UINT32, 1), number("tokenizer.ggml.eos_token_id", UINT32, 2)]
    tensors, data = [], b""
    for name, dimensions in shapes.items():
        kind, rows = (8, dimensions[1] * dimensions[0] // 32) if len(dimensions) == 2 else (0, 0)
        tensors.append(tensor(name, dimensions, kind, len(data)))
        data += blocks(rows, 34) if kind else np.ones(dimensions[0], "<f4").tobytes()
        data += bytes(-len(data) % 32)
    return gguf_file(entries, tensors, data)


def gguf_fields(content: bytes) -> Iterator[tuple[int, str]]:
    """Where a file's header has which numbers: counts, lengths, types, sizes, offsets."""
    at = 4

    def take(word: str) -> int:
        nonlocal at
        found.append((at, word))
        at += struct.calcsize(word)
        return struct.unpack_from(word, content, at - struct.calcsize(word))[0]

    def skip_text() -> None:
        nonlocal at
        length = take("<Q")
        at += length

    def skip_value(kind: int) -> None:
        if kind == STRING:
            skip_text()
        else:
            take("<" + WORDS[kind])

    found: list[tuple[int, str]] = []
    take("<I")
    tensors, entries = take("<Q"), take("<Q")
    for _ in range(entries):
        skip_text()
        kind = take("<I")
        if kind == ARRAY:
            kind, count = take("<I"), take("<Q")
            for _ in range(count):
                skip_value(kind)
        else:
            skip_value(kind)
    for _ in range(tensors):
        skip_text()
        for _ in range(take("<I")):
            take("<Q")
        take("<I")
        take("<Q")
    yield from found


def with_number(content: bytes, place: tuple[int, str], value: int) -> bytes:
    at, word = place
    size = struct.calcsize(word)
    return content[:at] + (value % (1 << 8 * size)).to_bytes(size, "little") + content[at + size :]


MODELS = {architecture: tiny_model(architecture) for architecture in ("llama", "gemma3")}
FIELDS = {architecture: list(gguf_fields(content)) for architecture, content in MODELS.items()}


def use_gguf(path: Path) -> None:
    """All that is read of a model: header, configuration, tokenizer, every tensor."""
    checkpoint = open_checkpoint(path)
    for name in checkpoint.names:
        assert checkpoint.read_bytes(name).nbytes == checkpoint.entry(name).nbytes
    assert checkpoint.nbytes > 0
    encode(path)


@pytest.fixture(scope="module", autouse=True)
def warm(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Imports and caches come first: they are no memory that a file takes."""
    element_type(12)  # imports the gguf package
    path = tmp_path_factory.mktemp("warm") / "model.gguf"
    for content in MODELS.values():
        path.write_bytes(content)
        use_gguf(path)


@pytest.mark.parametrize("architecture", MODELS)
def test_the_whole_model_is_read(tmp_path: Path, architecture: str) -> None:
    """The mutations begin with a file that is right."""
    path = tmp_path / "model.gguf"
    path.write_bytes(MODELS[architecture])
    assert outcome(path, len(MODELS[architecture]), lambda: use_gguf(path)) == ""


@pytest.mark.parametrize("architecture", MODELS)
@CASES
@given(data=st.data())
def test_gguf_numbers_that_lie(tmp_path: Path, architecture: str, data: st.DataObject) -> None:
    """Any counts, lengths, types, sizes and offsets, in one place or in a few."""
    content = MODELS[architecture]
    for _ in range(data.draw(st.sampled_from([1, 1, 1, 2, 4]))):
        content = with_number(content, data.draw(st.sampled_from(FIELDS[architecture])), data.draw(NUMBERS))
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    outcome(path, len(content), lambda: read_everything(path, GgufFile))
    outcome(path, len(content), lambda: use_gguf(path))


@CASES
@given(changes=st.lists(BYTES, min_size=1, max_size=4))
def test_gguf_bytes_that_changed(tmp_path: Path, changes: list[tuple[str, int, bytes]]) -> None:
    """Bytes put, inserted, deleted, or the file cut, anywhere in the header."""
    head = MODELS["llama"][:1500]
    content = mutated(head, changes) + MODELS["llama"][1500:]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    outcome(path, len(content), lambda: use_gguf(path))


DENSE = {
    "texts": gguf_file([array("a", STRING, 40_000, b"".join(text(f"{n % 100:02}") for n in range(40_000)))]),
    "empty texts": gguf_file([array("a", STRING, 60_000, bytes(8 * 60_000))]),
    "flags": gguf_file([array("a", BOOL, 400_000, bytes(400_000))]),
    "entries": gguf_file([number(chr(0x4E00 + n), UINT8, n % 256) for n in range(20_000)]),
    "tensors": gguf_file([], [tensor(f"{n:x}", [1], I8, 32 * n) for n in range(10_000)], bytes(32 * 10_000)),
}


@pytest.mark.parametrize("kind", DENSE)
def test_dense_gguf_headers_take_memory_in_proportion(tmp_path: Path, kind: str) -> None:
    """The smallest items there are, as many as a file has room for."""
    path = tmp_path / "model.gguf"
    path.write_bytes(DENSE[kind])
    assert outcome(path, len(DENSE[kind]), lambda: GgufFile(path)) == ""
