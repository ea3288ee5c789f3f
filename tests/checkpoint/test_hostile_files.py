"""safetensors and JSON files that lie: each opens, or is refused in one line; memory stays in proportion to it."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutations import BYTES, CASES, encode, mutated, outcome, read_everything, with_evil
from safetensors.numpy import save

from quantlab.checkpoint import open_checkpoint
from quantlab.checkpoint.safetensors_file import SafetensorsFile
from quantlab.errors import InputError

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


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with two shards, one of them with a packed tensor. It is used once before all: imports and caches
    are no memory that a file takes.
    """
    folder = tmp_path_factory.mktemp("folder")
    for name, content in JSON_FILES.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "model-00001.safetensors").write_bytes(save({"lm_head.weight": np.ones((2, 34), np.uint8)}))
    (folder / "model-00002.safetensors").write_bytes(save({"model.norm.weight": np.ones(32, np.float32)}))
    use_folder(folder)
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


def test_dense_json_takes_memory_in_proportion(tmp_path: Path) -> None:
    """Nothing but empty objects in config.json, nothing but empty tensors in a safetensors file."""
    content = json.dumps({"model_type": "bert", "a": [{}] * 50_000})
    (tmp_path / "config.json").write_text(content)
    assert outcome(tmp_path, len(content), lambda: open_checkpoint(tmp_path)) != ""
    path = tmp_path / "model.safetensors"
    empty = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({f"{n:x}": empty for n in range(10_000)}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    assert outcome(path, len(header), lambda: SafetensorsFile(path)) == ""


def test_a_folder_that_may_not_be_looked_into_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system administrator, as whom tests may run, may look anywhere: so the refusal is staged."""
    real = Path.exists

    def exists(path: Path, **options: bool) -> bool:
        if path.parent == tmp_path:
            raise PermissionError(13, "Permission denied")
        return real(path, **options)

    monkeypatch.setattr(Path, "exists", exists)
    with pytest.raises(InputError) as caught:
        open_checkpoint(tmp_path)
    assert str(caught.value) == f"{tmp_path}: cannot be read: Permission denied"
