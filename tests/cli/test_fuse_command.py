"""`quantlab fuse`: what it writes, takes back, and refuses; and the trained adapter in the commands that apply it."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from command_processes import Run, quantlab_process
from finetune_cases import OPTIONS, names, write_rows

from quantlab.calibration.quantize import quantize_checkpoint
from quantlab.checkpoint import open_checkpoint

Refusal = Callable[..., str]


@pytest.fixture(scope="module")
def bases(llama_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny Llama, in float32 and packed."""
    folder = tmp_path_factory.mktemp("bases")
    found = {"float": llama_model, "q4_1": folder / "q4_1", "q8_0": folder / "q8_0", "gguf": folder / "q4_1.gguf"}
    quantize_checkpoint(llama_model, found["q4_1"])
    quantize_checkpoint(llama_model, found["q8_0"], format="q8_0")
    quantize_checkpoint(llama_model, found["gguf"])
    return found


@pytest.fixture(scope="module")
def adapters(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """As `quantlab finetune` makes them."""
    from quantlab.training.finetune import finetune
    from quantlab.training.finetune_settings import FinetuneSettings

    folder = tmp_path_factory.mktemp("adapters")
    data = write_rows(folder / "data")
    common = {"rank": 4, "context": 64, "batch_size": 2, "learning_rate": 0.02, "max_steps": 4}
    for name, base, options in (
        ("lora", "q4_1", {}),
        ("block-sum", "q4_1", {"method": "block-sum"}),
        ("merge-aware", "gguf", {"merge_aware": True}),
    ):
        finetune(bases[base], data, folder / name, settings=FinetuneSettings(**common, **options))
    return {name: folder / name for name in ("lora", "block-sum", "merge-aware")}


@pytest.fixture
def mine(adapters: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of an adapter, to write into or to break."""
    return lambda name: Path(shutil.copytree(adapters[name], tmp_path / f"my {name}", dirs_exist_ok=True))


def weights(model: Path) -> dict[str, bytes]:
    checkpoint = open_checkpoint(model)
    return {name: checkpoint.read_bytes(name).tobytes() for name in checkpoint.names}


@pytest.mark.parametrize("adapter", ["lora", "block-sum"])
def test_recovery_is_reported(adapter: str, run: Run, bases, mine, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows")
    options = ("--method", "rtn", "--recovery", rows, "--context", 64)
    found = run("fuse", bases["q4_1"], mine(adapter), tmp_path / "out", *options, "--json").json["recovery"]
    assert found["samples"] == 3
    assert found["loss_adapter"] < found["loss_base"]
    kept = found["loss_base"] - found["loss_fused"]
    assert found["recovery"] == pytest.approx(kept / (found["loss_base"] - found["loss_adapter"]))
    assert (found["recovery"] == 1.0) == (adapter == "block-sum")
    told = run("fuse", bases["q4_1"], mine(adapter), tmp_path / "out", *options, "--overwrite").out
    assert f"recovery: {found['recovery']:.4f} (" in told


@pytest.mark.parametrize(
    ("base", "adapter", "out", "exact"),
    [
        ("q4_1", "block-sum", "fused", True),
        ("q4_1", "block-sum", "fused.gguf", True),
        ("gguf", "merge-aware", "fused.gguf", True),
        ("gguf", "merge-aware", "fused", True),
        ("float", "lora", "fused", True),
        ("gguf", "lora", "fused.gguf", False),
    ],
)
def test_one_json_object(base: str, adapter: str, out: str, exact: bool, bases, mine, tmp_path: Path) -> None:
    """Nothing beside it on either stream, and no file but OUT."""
    folder = mine(adapter)
    done = quantlab_process("fuse", bases[base], folder, tmp_path / out, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["exact"] is exact
    assert [tensor["name"] for tensor in found["tensors"]] == sorted(tensor["name"] for tensor in found["tensors"])
    assert len(found["tensors"]) == 8
    assert all(0 <= tensor["relative_error"] < 1 for tensor in found["tensors"])
    assert names(tmp_path) == sorted([out, folder.name])
    before, after = weights(bases[base]), weights(tmp_path / out)
    assert {name for name in before if before[name] != after[name]} == {tensor["name"] for tensor in found["tensors"]}


def test_what_a_person_reads(run: Run, bases, mine, tmp_path: Path) -> None:
    folder = mine("block-sum")
    outcome = run("fuse", bases["q4_1"], folder, tmp_path / "out")
    assert (outcome.status, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert lines[0].split() == ["tensor", "format", "changed", "relative", "error", "of", "the", "update"]
    assert lines[1].split()[:3] == ["model.layers.0.self_attn.k_proj.weight", "q4_1", "minimums"]
    assert "exact: yes" in outcome.out
    assert any(line.startswith(f"kept to undo: {folder}") for line in lines)
    assert lines[-1] == f"written: {tmp_path / 'out'}"
    inexact = run("fuse", bases["q8_0"], mine("lora"), tmp_path / "again", "--method", "rtn").out
    assert "exact: no" in inexact
    assert "note: 8 packed weights were quantized again, which took " in inexact


@pytest.mark.parametrize("out", ["fused", "fused.gguf"])
def test_undo_gives_the_old_bytes(run: Run, out: str, bases, mine, tmp_path: Path) -> None:
    folder = mine("block-sum")
    assert run("fuse", bases["q4_1"], folder, tmp_path / out, "--json").json["undo"].startswith(str(folder))
    found = run("fuse", tmp_path / out, folder, tmp_path / "back", "--undo", "--json").json
    assert found["exact"] is True
    assert len(found["tensors"]) == 8
    assert weights(tmp_path / "back") == weights(bases["q4_1"])
    if out == "fused":
        assert (tmp_path / "back/model.safetensors").read_bytes() == (bases["q4_1"] / "model.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_float_base_keeps_its_element_type(run: Run, dtype: str, bases, adapters, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    kind = getattr(torch, dtype)
    AutoModelForCausalLM.from_pretrained(bases["float"], dtype=kind).save_pretrained(tmp_path / "base")
    found = run("fuse", tmp_path / "base", adapters["lora"], tmp_path / "out", "--json").json
    assert found["exact"] is False
    assert found["notes"] == [f"8 weights were rounded to {'bf16' if dtype == 'bfloat16' else 'f16'}"]
    assert all(0 < tensor["relative_error"] < 2**-8 for tensor in found["tensors"])
    assert {open_checkpoint(tmp_path / "out").entry(t["name"]).dtype for t in found["tensors"]} == {
        "BF16" if dtype == "bfloat16" else "F16"
    }


def test_several_adapters_add_up(run: Run, bases, adapters, tmp_path: Path) -> None:
    """Half of one and all of another, in fp32: the float base has room for it."""
    import numpy as np

    from quantlab.adapters.reading import read_adapter

    run("fuse", bases["float"], f"{adapters['lora']}=0.5", tmp_path / "out", "--adapter", adapters["block-sum"])
    name = "model.layers.1.self_attn.o_proj.weight"
    before, after = (open_checkpoint(path).read(name).numpy() for path in (bases["float"], tmp_path / "out"))
    pairs = [(read_adapter(adapters[kind]).pairs[name], weight) for kind, weight in (("lora", 0.5), ("block-sum", 1))]
    expected = before + sum(weight * pair.scale * pair.b @ pair.a for pair, weight in pairs)
    np.testing.assert_allclose(after, expected, rtol=0, atol=1e-5)
    assert np.abs(after - before).max() > 1e-3


def test_wrong_requests(refusal: Refusal, bases, mine, adapters, tmp_path: Path) -> None:
    base, lora, out = bases["q4_1"], mine("lora"), tmp_path / "out"
    (tmp_path / "empty").mkdir()
    kept = {file: file.read_bytes() for file in lora.iterdir()}
    for arguments, message in (
        ((tmp_path / "gone", lora, out), "gone: no such folder or file"),
        ((base, tmp_path / "gone", out), "gone: no such adapter"),
        ((base, tmp_path / "empty", out), "empty: holds no adapter_config.json"),
        ((base, base, out), "holds no adapter_config.json"),
        ((base, lora / "adapter_config.json", out), "is no folder"),
        ((base, f"{lora}=half", out), "expected DIR or DIR=WEIGHT"),
        ((base, lora, out, "--adapter", f"{lora}="), "expected DIR or DIR=WEIGHT"),
        ((base, lora, tmp_path / "empty"), "exists already; choose another name or pass --overwrite"),
        ((base, lora, base, "--overwrite"), "is the model itself"),
        ((base, lora, base / "out"), "lies in the model's folder"),
        ((base, lora, lora, "--overwrite"), "is the adapter itself, or a folder around it"),
        ((base, lora, tmp_path, "--overwrite"), "is the adapter itself, or a folder around it"),
        ((base, lora, out, "--method", "wat"), "unknown method 'wat'"),
        ((base, lora, out, "--calibration", tmp_path / "gone"), "gone: cannot be read"),
        ((base, lora, out, "--threads", 0), "--threads 0"),
        ((bases["q8_0"], adapters["block-sum"], out), "q8_0 blocks have no minimum"),
        ((base, adapters["block-sum"], out, "--undo"), "keeps nothing that was replaced"),
        ((base, tmp_path / "gone", out, "--undo"), "gone: no such adapter"),
        ((base, lora, out, "--undo", "--adapter", lora), "--undo: takes back one adapter"),
        ((base, lora, lora, "--undo", "--overwrite"), "is the adapter itself, or a folder around it"),
    ):
        assert message in refusal("fuse", *arguments), arguments
    assert names(tmp_path) == ["empty", "my lora"]
    assert {file: file.read_bytes() for file in lora.iterdir()} == kept


@pytest.fixture(scope="module")
def others(make_model, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, str]]:
    """Models that no adapter here is for, and what tells them apart."""
    folder = tmp_path_factory.mktemp("others")
    return [
        (make_model(folder / "gpt2", "gpt2"), "model.layers.0.self_attn.k_proj.weight is not in the model"),
        (make_model(folder / "wide", "llama", hidden_size=128), "in the model, the adapter's [32, 64]"),
        (make_model(folder / "words", "llama", vocab_size=544), "544 tokens are in its vocabulary, the adapter's base"),
    ]


def test_an_adapter_for_another_model(refusal: Refusal, others, adapters, tmp_path: Path) -> None:
    for other, message in others:
        line = refusal("fuse", other, adapters["lora"], tmp_path / "out")
        assert message in line
        assert line.endswith("give the model that it was trained on")
        assert "does not fit" in refusal("generate", other, "-p", "a", "--adapter", adapters["lora"])


def rewritten(file: Path, change: Callable[[dict], object]) -> None:
    """With another header."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    encoded = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(encoded)) + encoded + content[8 + length :])


def first_a(header: dict) -> dict:
    return header[min(name for name in header if "lora_A" in name)]


NOTES = ('{"method": "wat"}', '{"method": "merge-aware", "levels": "x"}', '{"method": "lora", "base": 3}', "[", "7")
HEADERS = [
    (lambda header: first_a(header).update(shape=[400, 64]), "1024 bytes for F32 [400, 64]"),
    (lambda header: first_a(header).update(shape=[64, 4]), "do not fit"),
    (lambda header: first_a(header).update(dtype="I32"), "not a LoRA factor"),
    (lambda header: header["__metadata__"].update(quantlab='{"method": "block-sum"}'), "varies within a block"),
    *(
        (lambda header, note=note: header["__metadata__"].update(quantlab=note), "its quantlab note is damaged")
        for note in NOTES
    ),
]


@pytest.mark.parametrize(("change", "message"), HEADERS, ids=range(len(HEADERS)))
def test_headers_that_lie(refusal: Refusal, change, message: str, bases, mine, tmp_path: Path) -> None:
    folder = mine("lora")
    rewritten(folder / "adapter_model.safetensors", change)
    assert message in refusal("fuse", bases["q4_1"], folder, tmp_path / "out")


def test_damaged_weights(refusal: Refusal, bases, mine, tmp_path: Path) -> None:
    folder = mine("lora")
    file = folder / "adapter_model.safetensors"
    content = file.read_bytes()
    for damaged, message in (
        (content[: len(content) // 2], "the file is cut short"),
        (content[:5], "5 bytes are no safetensors file"),
        (b"", "0 bytes are no safetensors file"),
        (content[:-4] + struct.pack("<f", math.nan), "holds NaN or infinity"),
    ):
        file.write_bytes(damaged)
        assert message in refusal("fuse", bases["q4_1"], folder, tmp_path / "out")
    file.rename(folder / "adapter_model.bin")
    assert "only adapter_model.bin, a pickle" in refusal("fuse", bases["q4_1"], folder, tmp_path / "out")
    assert names(tmp_path) == ["my lora"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 0}, "r is 0; a positive number"),
        ({"lora_alpha": "x"}, "lora_alpha is 'x'"),
        ({"lora_alpha": 1e300}, "beyond single precision"),
        ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern 'q_proj': 'x' is no number"),
        ({"alpha_pattern": {"(": 1}}, "is no regular expression"),
        ({"rank_pattern": [1]}, "rank_pattern is no object"),
        ({"peft_type": "IA3"}, "only LORA adapters"),
        ({"use_dora": True}, "disagree"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is set"),
        ({"bias": "all"}, "trains biases"),
    ],
    ids=str,
)
def test_configurations_that_cannot_be(refusal: Refusal, changes, message: str, bases, mine, tmp_path: Path) -> None:
    folder = mine("lora")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    assert message in refusal("fuse", bases["q4_1"], folder, tmp_path / "out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_keep_what_undo_needs(refusal: Refusal, bases, mine, tmp_path: Path) -> None:
    folder = mine("block-sum")
    folder.chmod(0o555)
    assert "copy the adapter" in refusal("fuse", bases["q4_1"], folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_adapter_serves_generate_and_compare(run: Run, bases, adapters, prose: Path, tmp_path: Path) -> None:
    """finetune, then generate and compare on the shipped model, and the fused file in its place."""
    prompt = ("-p", "Say 3: ", "-n", 8, "--temp", 0)
    live = run("generate", bases["gguf"], *prompt, "--adapter", adapters["merge-aware"], "--json").json
    assert live["engine"] == "native"
    assert live["token_ids"] != run("generate", bases["gguf"], *prompt, "--json").json["token_ids"]
    text = tmp_path / "text.txt"
    text.write_text("".join(prose.read_text(encoding="utf-8").splitlines(keepends=True)[:10]), encoding="utf-8")
    run("fuse", bases["q4_1"], adapters["block-sum"], tmp_path / "fused")
    found = run(
        "compare", bases["q4_1"], tmp_path / "fused", text, "--context", 64, "--adapter-a", adapters["block-sum"],
        "--json",
    ).json  # fmt: skip
    assert 0 <= found["kld_mean"] < 1e-4
    plain = run(
        "compare", bases["q4_1"], bases["q4_1"], text, "--context", 64, "--adapter-a", adapters["lora"], "--json"
    )
    assert plain.json["kld_mean"] > 0.01


def test_options_are_those_of_finetune(run: Run, bases, tmp_path: Path) -> None:
    """From data to the fused file by commands alone."""
    data = write_rows(tmp_path / "data")
    assert run("finetune", bases["gguf"], data, tmp_path / "tuned", *OPTIONS, "--merge-aware").status == 0
    found = run("fuse", bases["gguf"], tmp_path / "tuned", tmp_path / "fused.gguf", "--json").json
    assert found["exact"] is True
    assert run("verify", tmp_path / "fused.gguf", "--json").json["ok"] is True
