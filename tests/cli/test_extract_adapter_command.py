"""`quantlab extract-adapter`: the fields of its JSON, its table, its refusals."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_processes import Run
from safetensors.torch import load_file, save_file

from quantlab.adapters.reading import read_adapter

Refusal = Callable[..., str]


@pytest.fixture(scope="module")
def tuned(llama_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with values of rank 2 added to its query weights, and a larger norm."""
    folder = Path(shutil.copytree(llama_model, tmp_path_factory.mktemp("tuned") / "model"))
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, weight in weights.items():
        if "q_proj" in name:
            change = torch.randn(len(weight), 2, generator=generator) @ torch.randn(2, 64, generator=generator)
            weights[name] = weight + 0.1 * change
    weights["model.norm.weight"] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_what_it_reports_and_writes(run: Run, llama_model: Path, tuned: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    found = run("extract-adapter", llama_model, tuned, out, "--rank", "2", "--json").json
    assert found["adapter"] == str(out)
    assert [(t["name"], t["rank"]) for t in found["tensors"]] == [
        (f"model.layers.{layer}.self_attn.q_proj.weight", 2) for layer in (0, 1)
    ]
    assert all(0.999999 < t["captured"] <= 1 and t["change"] > 0.1 for t in found["tensors"])
    assert found["captured"] > 0.999999
    assert found["parameters"] == read_adapter(out).parameters == 2 * 2 * (64 + 64)
    (note,) = found["notes"]
    assert note.startswith("norm (1 tensor) changed too")
    told = run("extract-adapter", llama_model, tuned, out, "-r", "1", "--overwrite", "--targets", "attention").out
    assert "model.layers.1.self_attn.q_proj.weight" in told
    assert "note: norm" in told
    assert f"written: {out}" in told
    assert read_adapter(out).pairs["model.layers.0.self_attn.q_proj.weight"].rank == 1


def test_what_is_refused(refusal: Refusal, llama_model: Path, tuned: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    for message, arguments in {
        "nothing to extract": (llama_model, llama_model, out),
        "--rank 0": (llama_model, tuned, out, "--rank", "0"),
        "--targets: 'wat'": (llama_model, tuned, out, "--targets", "wat"),
        "no such": (llama_model, tmp_path / "nowhere", out),
        "exists already": (llama_model, tuned, tmp_path),
    }.items():
        assert message in refusal("extract-adapter", *arguments), arguments
    assert not out.exists()
