"""Broken and hostile folders through the real commands: status 2, one line on stderr that names file and fault, nothing
left behind, nothing executed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hostile_models import READERS, RUNNERS, Run, change_config, copy_of

# What is no model at all.


def test_paths_that_are_no_model(refusals: Run, tmp_path: Path) -> None:
    """Missing, a loop of links, empty, a pipe, a device: nobody waits, and each is named."""
    (tmp_path / "one").symlink_to(tmp_path / "two")
    (tmp_path / "two").symlink_to(tmp_path / "one")
    for name in ("missing", "missing.gguf", "one", "two"):
        assert refusals(tmp_path / name) == f"{tmp_path / name}: no such folder or file"
    (tmp_path / "empty.gguf").touch()
    assert refusals(tmp_path / "empty.gguf") == f"{tmp_path}/empty.gguf: 0 bytes are no GGUF file; download it again"
    os.mkfifo(tmp_path / "pipe.gguf")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe.gguf", tmp_path / "pipe", Path("/dev/zero")):
        assert refusals(path).startswith(f"{path}: is ")


def test_a_folder_named_like_a_file_is_a_folder(refusals: Run, tmp_path: Path) -> None:
    folder = tmp_path / "model.gguf"
    folder.mkdir()
    assert refusals(folder, *READERS) == f"{folder}: holds no config.json; is this a model folder?"
    assert refusals(folder, *RUNNERS).startswith(f"{folder}: holds no tokenizer")


def test_pipes_and_folders_in_place_of_files(refusals: Run, llama_model: Path, tmp_path: Path) -> None:
    """config.json and the tensors: a pipe would keep its reader waiting for ever."""
    for place, make in enumerate((os.mkfifo, Path.mkdir)):
        folder = copy_of(llama_model, tmp_path / f"config{place}")
        (folder / "config.json").unlink()
        make(folder / "config.json")
        assert refusals(folder).startswith(f"{folder}/config.json: is a folder, pipe or device")
        folder = copy_of(llama_model, tmp_path / f"tensors{place}")
        (folder / "model.safetensors").unlink()
        make(folder / "model.safetensors")
        assert refusals(folder).startswith(f"{folder}: holds neither model.safetensors nor pytorch_model.bin")


# config.json and the index.


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b'{"model_type": "llama", "note": "caf\xe9"}', "not valid JSON; download it again"),
        (b'{"model_type": "llama", "rope_theta": NaN}', "not valid JSON; download it again"),
        (b'{"model_type": "llama", "note": "\\ud800"}', "not valid JSON; download it again"),
        (b'{"model_type":' * 100_000, "not valid JSON; download it again"),
        (b"[1]", "not a JSON object"),
        (b'{"model_type": "bert"}', "model_type 'bert' is not supported; supported: gpt2, "),
        (b'{"model_type": "a\\n\\u001b[31m"}', r"model_type 'a\n\x1b[31m' is not supported; supported: gpt2, "),
    ],
    ids=["latin", "NaN", "half a pair", "nested", "list", "family", "escape"],
)
def test_a_wrong_config(refusals: Run, llama_model: Path, tmp_path: Path, content: bytes, fault: str) -> None:
    folder = copy_of(llama_model, tmp_path / "model")
    (folder / "config.json").write_bytes(content)
    assert refusals(folder).startswith(f"{folder}/config.json: {fault}")


def test_a_config_of_a_terabyte_is_not_read(refusals: Run, llama_model: Path, tmp_path: Path) -> None:
    folder = copy_of(llama_model, tmp_path / "model")
    os.truncate(folder / "config.json", 1 << 40)
    assert refusals(folder).startswith(f"{folder}/config.json: has 1099511627776 bytes, too many for such a file")


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"hidden_size": 128}, ": the files are not those of its config.json: model.embed_tokens.weight is [512, 64]"),
        ({"vocab_size": 511}, ": the files are not those of its config.json: model.embed_tokens.weight is [512, 64]"),
        ({"num_hidden_layers": 3}, ": the files are not those of its config.json: model.layers.2.self_attn.q_proj"),
        (
            {"intermediate_size": 97},
            ": the files are not those of its config.json: model.layers.0.mlp.gate_proj.weight",
        ),
        ({"num_hidden_layers": 10**9}, "/config.json: num_hidden_layers is 1000000000, and the files hold 20 tensors"),
        ({"vocab_size": 1 << 62}, "/config.json: describes no model: "),
        ({"num_attention_heads": 0}, "/config.json: describes no model: "),
        ({"hidden_size": -64}, "/config.json: describes no model: "),
        ({"hidden_size": "64"}, "/config.json: describes no model: "),
        ({"rms_norm_eps": [1]}, "/config.json: describes no model: "),
    ],
    ids=range(10),
)
def test_a_config_that_is_not_of_these_weights(
    refusals: Run, llama_model: Path, tmp_path: Path, values: dict[str, Any], fault: str
) -> None:
    """What runs the model says which tensor differs; a billion layers are not built to find that out."""
    folder = copy_of(llama_model, tmp_path / "model")
    change_config(folder, **values)
    assert refusals(folder, *RUNNERS).startswith(f"{folder}{fault}")


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"hidden_size": 128}, ": the files are not those of its config.json: model.embed_tokens.weight is [512, 64]"),
        ({"num_hidden_layers": 10**9}, "/config.json: num_hidden_layers is 1000000000 instead of a whole number"),
        ({"vocab_size": 1 << 62}, "/config.json: vocab_size is 4611686018427387904 instead of a whole number"),
        ({"num_attention_heads": 0}, "/config.json: num_attention_heads is 0 instead of a whole number"),
        ({"hidden_size": "64"}, "/config.json: hidden_size is '64' instead of a whole number"),
        ({"rms_norm_eps": [1]}, "/config.json: rms_norm_eps is [1] instead of a positive number"),
    ],
    ids=range(6),
)
def test_what_needs_no_torch_says_so_too(
    refusals: Run, llama_model: Path, tmp_path: Path, values: dict[str, Any], fault: str
) -> None:
    folder = copy_of(llama_model, tmp_path / "model")
    change_config(folder, **values)
    assert refusals(folder, "generate", "perplexity", "quantize").startswith(f"{folder}{fault}")


@pytest.mark.parametrize(
    ("shard", "fault"),
    [
        ("model-00001-of-00002.safetensors", "names model-00001-of-00002.safetensors, which is missing; download it"),
        ("loop", "names loop, which is missing; download it"),
        ("pipe", "names pipe, which is missing; download it"),
        ("a\0b", r"names a\x00b, which is missing; download it"),
        ("n" * 300, f"names {'n' * 300}, which is missing; download it"),
        ("../model/model.safetensors", "shard '../model/model.safetensors' is no plain file name"),
        ("/etc/passwd", "shard '/etc/passwd' is no plain file name"),
        ("", "shard '' is no plain file name"),
        ("model.safetensors.index.json", "claims a header of "),  # the index names itself
    ],
    ids=range(9),
)
def test_an_index_that_leads_nowhere(refusals: Run, llama_model: Path, tmp_path: Path, shard: str, fault: str) -> None:
    folder = copy_of(llama_model, tmp_path / "model")
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": shard}}))
    assert refusals(folder).startswith(f"{index}: {fault}")
