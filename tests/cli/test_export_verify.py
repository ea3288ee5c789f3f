"""`quantlab export`, `quantlab verify` and GGUF files with every other command, as a user types them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantlab import load_tokenizer
from quantlab.checkpoint.gguf_file import GgufFile

Run = Callable[..., Any]  # see conftest.py


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory, prose: Path) -> Path:
    """The first 30 lines of the prose."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("".join(prose.read_text(encoding="utf-8").splitlines(keepends=True)[:30]), encoding="utf-8")
    return file


@pytest.fixture
def files(run: Run, llama_model: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A model as an fp32 GGUF file, and quantized to another."""
    exported = run("export", llama_model, tmp_path / "float.gguf", "--to", "gguf", "--json").json
    assert (exported["lossless"], exported["tensors_changed"], exported["changed"]) == (True, 0, [])
    assert exported["bytes"] == (tmp_path / "float.gguf").stat().st_size
    quantized = run("quantize", llama_model, tmp_path / "packed.gguf", "--json").json
    inspected = run("inspect", tmp_path / "packed.gguf", "--json").json
    for field in ("parameters", "bytes", "bits_per_weight"):
        assert inspected[field] == quantized[field]
    assert [t["format"] for t in inspected["tensors"]].count("q4_1") == 14
    return tmp_path / "float.gguf", tmp_path / "packed.gguf"


def test_gguf_files_go_wherever_folders_go(run: Run, files: tuple[Path, Path], text: Path, llama_model: Path) -> None:
    exact, packed = files
    common = ("--context", 64, "-t", 1, "--json")
    from_folder = run("perplexity", llama_model, text, *common).json
    assert run("perplexity", exact, text, *common).json == from_folder
    result = run("compare", llama_model, packed, text, *common).json
    assert result["perplexity_a"] == pytest.approx(from_folder["perplexity"], rel=1e-6)
    assert 0 < result["kld_mean"] < 0.1
    identical = run("compare", llama_model, exact, text, *common).json
    assert (identical["kld_mean"], identical["same_top"]) == (0, 1)
    sampled = ("-p", "Once upon", "-n", 8, "--seed", 3, "-t", 1, "--json")
    assert (
        run("generate", exact, *sampled).json["token_ids"] == run("generate", llama_model, *sampled).json["token_ids"]
    )


def test_a_gguf_file_is_quantized_like_its_folder(run: Run, files: tuple[Path, Path], tmp_path: Path) -> None:
    exact, packed = files
    run("quantize", exact, tmp_path / "again.gguf", "--json")
    ours, theirs = GgufFile(tmp_path / "again.gguf"), GgufFile(packed)
    assert sorted(ours.entries) == sorted(theirs.entries)
    assert all((ours.read(name) == theirs.read(name)).all() for name in ours.entries)
    assert ours.metadata["general.name"] == theirs.metadata["general.name"]
    assert ours.metadata["quantlab.method"] == "rtn"


def test_there_and_back_is_the_same_folder(
    run: Run, files: tuple[Path, Path], llama_model: Path, tmp_path: Path
) -> None:
    _, packed = files
    shown = run("export", packed, tmp_path / "back", "--to", "hf")
    assert shown.status == 0
    assert shown.out.splitlines()[0].startswith("20 tensors (lossless), ")
    assert shown.out.splitlines()[1] == f"written: {tmp_path / 'back'}"
    assert shown.err == ""
    run("quantize", llama_model, tmp_path / "straight")
    one, other = tmp_path / "back" / "model.safetensors", tmp_path / "straight" / "model.safetensors"
    assert one.read_bytes() == other.read_bytes()
    words = "Once upon a time, 1234"
    assert load_tokenizer(tmp_path / "back").encode(words) == load_tokenizer(llama_model).encode(words)


def test_verify_tells_and_exits_with_2(run: Run, files: tuple[Path, Path], llama_model: Path) -> None:
    _, packed = files
    sound = run("verify", packed, "--source", llama_model, "--json").json
    assert (sound["ok"], sound["faults"]) == (True, [])
    assert run("verify", packed).out.startswith("sound: 20 tensors, ")
    data = bytearray(packed.read_bytes())
    entry = GgufFile(packed).entries["blk.1.ffn_down.weight"]
    data[entry.offset + 20 * 7 + 9] ^= 16
    packed.write_bytes(data)
    found = run("verify", packed, "--source", llama_model)
    name = "model.layers.1.mlp.down_proj.weight"
    assert found.status == 2
    assert f"{name}, block 7: is not what rounding the source to nearest gives" in found.out.splitlines()
    assert found.err.count("\n") == 1
    assert found.err.startswith(f"quantlab: {packed}: 2 fault(s) found, the first: {name}")
    as_json = run("verify", packed, "--json")
    assert as_json.status == 2
    assert f'"tensor": "{name}"' in as_json.out


def test_what_llama_cpp_does_otherwise_is_said(run: Run, make_model: Callable[..., Path], tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "mistral", tied=False)
    shown = run("export", model, tmp_path / "out.gguf", "--to", "gguf")
    assert shown.status == 0
    (note,) = [line for line in shown.out.splitlines() if line.startswith("note: ")]
    assert "window" in note


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["export", "nothing", "out.gguf", "--to", "gguf"], "nothing: no such folder or file"),
        (["export", "{model}", "out.gguf"], "Missing option '--to'. (see: quantlab export --help)"),
        (["export", "{model}", "out", "--to", "gguf"], "out: a GGUF file's name ends in .gguf"),
        (["verify", "nothing"], "nothing: no such folder or file"),
        (["verify", "{model}", "--source", "nothing"], "nothing: no such folder or file"),
        (["quantize", "{model}", "/proc/out.gguf"], "/proc: cannot be written"),
    ],
)
def test_wrong_requests(refusal: Callable[..., str], arguments: list[str], line: str, llama_model: Path) -> None:
    told = refusal(*[argument.replace("{model}", str(llama_model)) for argument in arguments])
    assert told.startswith(line)
