"""Files with mutated headers: each opens, or is refused in one line; memory stays in proportion to the file.

The mutations know the formats (counts, lengths, types, sizes and offsets are replaced by numbers that overflow, lie and
repeat), so that most of them get beyond the first check.
"""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_bytes import ARRAY, FLOAT32, INT32, STRING, UINT32, WORDS, array, entry, gguf_file, number, tensor, text
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from quantlab.checkpoint import load_tokenizer, open_checkpoint
from quantlab.checkpoint.gguf_file import GgufFile
from quantlab.checkpoint.gguf_types import element_type
from quantlab.checkpoint.safetensors_file import SafetensorsFile
from quantlab.errors import InputError

# The same cases in every run: what fails once fails again.
CASES = settings(
    derandomize=True, database=None, deadline=None, max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
# The most that a header takes in memory for each of its bytes (a name of two characters becomes an object of fifty
# bytes, an entry of a dictionary and one of a table), and what Python needs whatever the file is.
BYTES_PER_BYTE, BYTES_AT_LEAST = 64, 400_000

NUMBERS = st.sampled_from(
    [0, 1, 2, 3, 4, 5, 8, 31, 32, 33, 64, 255, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 40, 1 << 61,
     (1 << 62) + 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 32, (1 << 64) - 1]
) | st.integers(0, (1 << 64) - 1)  # fmt: skip
BYTES = st.tuples(st.sampled_from(["put", "insert", "delete", "cut"]), st.integers(0, 1 << 30), st.binary(max_size=9))
EVIL_TEXTS = st.sampled_from(
    [
        "",
        "../../x",
        "/etc/passwd",
        "a\0b",
        "a\nb",
        "\x1b[31m\x07",
        "\u202ea",
        "\ud800",
        "x" * 5000,
        "NaN",
        "1e999",
        "[/x]",
    ]
)
EVIL_VALUES = (
    st.none() | st.booleans() | EVIL_TEXTS | st.integers(-5, 5) | NUMBERS
    | st.sampled_from([-1.5, 1e308, float("nan"), float("inf"), 10**400, [], {}, [[]], {"a": {}}, [[[[[[[[1]]]]]]]], ["", 1]])
)  # fmt: skip


def outcome(path: Path, size: int, use: Callable[[], object]) -> str:
    """The line of an InputError, "" where none was raised; anything else that is raised is a fault."""
    line = ""
    tracemalloc.start()
    try:
        use()
    except InputError as error:
        line = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak <= BYTES_AT_LEAST + BYTES_PER_BYTE * size, f"{peak} bytes of memory for a file of {size}: {line}"
    assert line == "" or (line.isprintable() and str(path) in line), line
    return line


def read_everything(path: Path, kind: Callable[[Path], SafetensorsFile | GgufFile]) -> None:
    file = kind(path)
    for name, found in file.entries.items():
        assert file.read(name).nbytes == found.nbytes
    file.close()


def encode(model: Path) -> None:
    """Load the tokenizer and use it; what it cannot do with a text is an error of the text."""
    tokenizer = load_tokenizer(model)
    with contextlib.suppress(InputError):
        tokenizer.encode("a <s> b</s>")


def mutated(content: bytes, changes: list[tuple[str, int, bytes]]) -> bytes:
    data = bytearray(content)
    for action, place, new in changes:
        at = place % (len(data) + 1)
        if action == "put":
            data[at : at + len(new)] = new
        elif action == "insert":
            data[at:at] = new
        elif action == "delete":
            del data[at : at + len(new)]
        else:
            del data[at:]
    return bytes(data)


# GGUF


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
        entries += [array("quantlab.norm_residuals", FLOAT32, 192 + 32 - 32, bytes(4 * 192))]
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


# safetensors and JSON


def places(value: Any) -> Iterator[tuple[Any, ...]]:
    """The paths to all values within a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (key,)
        for rest in places(inner):
            yield (key, *rest)


def with_evil(data: st.DataObject, value: Any) -> str:
    """JSON text in which some values are replaced, removed, renamed, or there twice."""
    value = copy.deepcopy(value)
    for _ in range(data.draw(st.sampled_from([1, 1, 1, 2, 3]))):
        if not (all_places := list(places(value))):
            break
        *above, last = data.draw(st.sampled_from(all_places))
        holder = value
        for key in above:
            holder = holder[key]
        action = data.draw(st.sampled_from(["replace", "replace", "replace", "remove", "rename"]))
        if action == "replace":
            holder[last] = copy.deepcopy(data.draw(EVIL_VALUES))
        elif action == "remove" or isinstance(holder, list):
            del holder[last]
        else:
            holder[data.draw(EVIL_TEXTS)] = holder.pop(last)
    found = json.dumps(value)
    return found.replace("{", '{"a": 1, "a": 2, ', 1) if data.draw(st.integers(0, 20)) == 0 else found


TENSORS = {"model.embed_tokens.weight": np.ones((4, 3), np.float32), "b.weight": np.ones((2, 20), np.uint8),
           "scalar": np.ones((), np.int64), "none": np.ones((0, 5), np.float16)}  # fmt: skip
WEIGHTS = save(TENSORS, {"format": "pt"})
HEADER_END = 8 + struct.unpack_from("<Q", WEIGHTS)[0]


@CASES
@given(data=st.data())
def test_safetensors_headers_that_lie(tmp_path: Path, data: st.DataObject) -> None:
    """Any types, shapes, offsets, names, and things that are none."""
    header = with_evil(data, json.loads(WEIGHTS[8:HEADER_END])).encode()
    content = struct.pack("<Q", len(header)) + header + WEIGHTS[HEADER_END:]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    outcome(path, len(content), lambda: read_everything(path, SafetensorsFile))


@CASES
@given(changes=st.lists(BYTES, min_size=1, max_size=4))
def test_safetensors_bytes_that_changed(tmp_path: Path, changes: list[tuple[str, int, bytes]]) -> None:
    """Bytes put, inserted, deleted, or the file cut, anywhere in the header."""
    content = mutated(WEIGHTS[:HEADER_END], changes) + WEIGHTS[HEADER_END:]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    outcome(path, len(content), lambda: read_everything(path, SafetensorsFile))


JSON_FILES: dict[str, dict[str, Any]] = {
    "config.json": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "tie_word_embeddings": False,
        "eos_token_id": [2, 3],
        "quantization_config": {
            "quant_method": "quantlab",
            "rules_version": 1,
            "rules": [["lm_head.weight", "q8_0"], ["*.q_proj.*", None], ["*_proj.weight", "q4_1"]],
        },
    },
    "model.safetensors.index.json": {
        "metadata": {"total_size": 200},
        "weight_map": {"lm_head.weight": "model-00001.safetensors", "model.norm.weight": "model-00002.safetensors"},
    },
    "tokenizer_config.json": {"eos_token": {"content": "</s>", "lstrip": False}, "bos_token": "<s>"},
    "generation_config.json": {"eos_token_id": [2], "max_length": 20},
    "tokenizer.json": {
        "version": "1.0",
        "added_tokens": [
            {"id": 2, "content": "</s>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
             "special": True}
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {"<unk>": 0, "a": 1, "</s>": 2}, "unk_token": "<unk>"},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with two shards, one of them with a packed tensor."""
    folder = tmp_path_factory.mktemp("folder")
    for name, content in JSON_FILES.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "model-00001.safetensors").write_bytes(save({"lm_head.weight": np.ones((2, 34), np.uint8)}))
    (folder / "model-00002.safetensors").write_bytes(save({"model.norm.weight": np.ones(32, np.float32)}))
    return folder


def use_folder(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    for name in checkpoint.names:
        assert checkpoint.read_bytes(name).nbytes == checkpoint.entry(name).nbytes
    assert checkpoint.parameters > 0
    encode(folder)


@pytest.mark.parametrize("name", JSON_FILES)
@CASES
@given(data=st.data())
def test_json_files_that_lie(folder: Path, tmp_path: Path, name: str, data: st.DataObject) -> None:
    """Any values in config.json, quantization_config, index and tokenizer files."""
    work = tmp_path / "model"
    if not work.exists():
        shutil.copytree(folder, work)
        use_folder(work)
    content = with_evil(data, JSON_FILES[name])
    (work / name).write_text(content)
    outcome(work, len(content) + 2000, lambda: use_folder(work))


@pytest.mark.parametrize("name", JSON_FILES)
def test_json_files_that_are_none(folder: Path, tmp_path: Path, name: str) -> None:
    """Empty, another kind of value, not UTF-8, nested without end, a number without end."""
    work = Path(shutil.copytree(folder, tmp_path / "model"))
    for content in (b"", b"{", b"null", b"[]", b"3", b'"text"', b"\xff\xfe{}", b"\xef\xbb\xbf{}", b"[" * 100_000,
                    b'{"a":' * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b'{"a": NaN}', bytes(4096)):  # fmt: skip
        (work / name).write_bytes(content)
        assert outcome(work, len(content), lambda: use_folder(work)) != ""
