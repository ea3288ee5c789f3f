"""`quantlab export ADAPTER OUT.gguf --to gguf`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from command_processes import Run, quantlab_process
from finetune_cases import names

from quantlab.adapters.adapter import Adapter, LowRankPair
from quantlab.adapters.peft_folder import write_peft_folder

Refusal = Callable[..., str]
NAME = "model.layers.{}.self_attn.o_proj.weight"


def write_adapter(folder: Path, base: Path | None, scales: tuple[float, float] = (0.5, 0.5)) -> Path:
    """For the outputs of the tiny Llama's attention; `base` is what its files name."""
    random = np.random.default_rng(0)
    pairs = {
        NAME.format(layer): LowRankPair(*random.normal(0, 1, (2, 64, 4)).astype(np.float32), scale)
        for layer, scale in enumerate(scales)
    }
    pairs = {name: LowRankPair(pair.a.T.copy(), pair.b, pair.scale) for name, pair in pairs.items()}
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4 * scales[0], "base_model_name_or_path": base and str(base)}
    if scales[1] != scales[0]:
        config["alpha_pattern"] = {"layers.1.self_attn.o_proj": 4 * scales[1]}
    write_peft_folder(Adapter(folder, "lora", pairs), config, folder)
    return folder


@pytest.fixture
def model(llama_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama_model, tmp_path / "model"))


@pytest.mark.parametrize("given", [False, True], ids=["as its files say", "--base"])
def test_one_json_object(given: bool, model: Path, tmp_path: Path) -> None:
    from gguf import GGUFReader

    adapter = write_adapter(tmp_path / "adapter", None if given else model)
    base = ("--base", model) if given else ()
    done = quantlab_process("export", adapter, tmp_path / "out.gguf", "--to", "gguf", *base, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    size = (tmp_path / "out.gguf").stat().st_size
    expected = {"bytes": size, "lossless": True, "tensors_changed": 0, "tensors": 2, "parameters": 2 * 2 * 64 * 4}
    assert json.loads(done.stdout) == expected
    tensors = {tensor.name for tensor in GGUFReader(tmp_path / "out.gguf").tensors}
    assert tensors == {f"blk.{layer}.attn_output.weight.lora_{part}" for layer in range(2) for part in "ab"}
    assert names(tmp_path) == ["adapter", "model", "out.gguf"]


def test_what_a_person_reads(run: Run, model: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", model, (0.5, 0.25))
    outcome = run("export", adapter, tmp_path / "out.gguf", "--to", "gguf")
    assert (outcome.status, outcome.err) == (0, "")
    assert outcome.out.startswith("adapter of 2 tensors, scales folded into 2 of them, ")
    assert outcome.out.endswith(f"written: {tmp_path / 'out.gguf'}\n")


def test_a_base_that_has_moved(refusal: Refusal, run: Run, model: Path, tmp_path: Path) -> None:
    adapter, out = write_adapter(tmp_path / "adapter", model), tmp_path / "out.gguf"
    model.rename(tmp_path / "moved")
    line = refusal("export", adapter, out, "--to", "gguf")
    assert (
        line
        == f"{adapter}: the base that its files name cannot be opened ({model}: no such folder or file); give --base"
    )
    assert refusal("export", adapter, out, "--to", "gguf", "--base", tmp_path / "gone").endswith(
        "no such folder or file"
    )
    assert run("export", adapter, out, "--to", "gguf", "--base", tmp_path / "moved").status == 0
    nameless = write_adapter(tmp_path / "nameless", None)
    assert refusal("export", nameless, out, "--to", "gguf").endswith("names no base model; give it with --base")


@pytest.fixture(scope="module")
def other(make_model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("other"), "gpt2")


def test_wrong_requests(refusal: Refusal, model: Path, other: Path, tmp_path: Path) -> None:
    adapter, out = write_adapter(tmp_path / "adapter", model), tmp_path / "out.gguf"
    assert "is an adapter in Hugging Face form already" in refusal("export", adapter, tmp_path / "out", "--to", "hf")
    assert "give --to gguf and a name in .gguf" in refusal("export", adapter, tmp_path / "out", "--to", "gguf")
    assert "does not fit" in refusal("export", adapter, out, "--to", "gguf", "--base", other)
    for place in (model, adapter):
        holder = place.rename(place.with_suffix(".gguf"))
        adapter = holder if place == adapter else adapter
        base = ("--base", tmp_path / "model.gguf")
        line = refusal("export", adapter, holder, "--to", "gguf", *base, "--overwrite")
        assert "itself, or a folder around it" in line
    out.write_text("mine")
    assert "exists already" in refusal("export", adapter, out, "--to", "gguf", "--base", tmp_path / "model.gguf")
    assert out.read_text() == "mine"
    assert names(tmp_path) == ["adapter.gguf", "model.gguf", "out.gguf"]
