"""Adapters out of two models: what is captured, what peft makes of it, and what is told of the rest."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from quantlab.adapters.extract import extract_adapter
from quantlab.adapters.reading import read_adapter
from quantlab.calibration.fuse import fuse_adapter
from quantlab.calibration.quantize import quantize_checkpoint
from quantlab.checkpoint import open_checkpoint
from quantlab.checkpoint.export import export_checkpoint
from quantlab.errors import InputError

ENDS = {"llama": ("q_proj.weight", "down_proj.weight"), "gpt2": ("c_attn.weight", "mlp.c_proj.weight")}


def tuned_from(
    base: Path, folder: Path, rank: int | None, *, ends=ENDS["llama"], also: str = "", seed: int = 1
) -> Path:
    """A copy of a model folder, the layers that end so changed by random matrices of that rank (None: full)."""
    import shutil

    shutil.copytree(base, folder)
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    for name, weight in weights.items():
        if name.endswith(ends) and weight.ndim == 2:
            if rank is None:
                change = torch.randn(weight.shape, generator=generator)
            else:
                left = torch.randn(weight.shape[0], rank, generator=generator)
                change = left @ torch.randn(rank, weight.shape[1], generator=generator)
            weights[name] = weight + 0.02 * change
        elif also and also in name:
            weights[name] = weight + 0.5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_change_of_low_rank_comes_back_whole(family: str, make_model, tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", family)
    tuned = tuned_from(base, tmp_path / "tuned", 3, ends=ENDS[family])
    report = extract_adapter(base, tuned, tmp_path / "adapter", rank=4)
    assert report.notes == ()
    assert report.adapter == str(tmp_path / "adapter")
    assert len(report.tensors) == 4
    assert all(t.captured > 1 - 1e-9 and t.rank >= 3 for t in report.tensors)
    assert report.captured > 1 - 1e-9
    fuse_adapter(base, tmp_path / "adapter", tmp_path / "fused")
    fused, wanted = open_checkpoint(tmp_path / "fused"), open_checkpoint(tuned)
    for name in wanted.names:
        torch.testing.assert_close(fused.read(name), wanted.read(name), rtol=0, atol=2e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_peft_loads_it_and_computes_what_the_tuned_model_does(family: str, make_model, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = make_model(tmp_path / "base", family)
    tuned = tuned_from(base, tmp_path / "tuned", 2, ends=ENDS[family])
    extract_adapter(base, tuned, tmp_path / "adapter", rank=2)
    ids = torch.arange(5, 25)[None]
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(tuned).eval()(ids).logits
        torch.testing.assert_close(adapted(ids).logits, wanted, rtol=0, atol=1e-4)
        with adapted.disable_adapter():
            assert not torch.allclose(adapted(ids).logits, wanted, atol=1e-2)


def test_the_best_low_rank_part_of_a_full_change_is_kept(llama_model: Path, tmp_path: Path) -> None:
    tuned = tuned_from(llama_model, tmp_path / "tuned", None)
    report = extract_adapter(llama_model, tuned, tmp_path / "adapter", rank=8)
    before, after, adapter = open_checkpoint(llama_model), open_checkpoint(tuned), read_adapter(tmp_path / "adapter")
    assert set(adapter.pairs) == {t.name for t in report.tensors}
    energy = kept = 0.0
    for tensor in report.tensors:
        delta = (after.read(tensor.name).double() - before.read(tensor.name).double()).numpy()
        squares = np.linalg.svd(delta, compute_uv=False) ** 2
        assert tensor.captured == pytest.approx(squares[:8].sum() / squares.sum(), abs=1e-6)
        assert tensor.change == pytest.approx(squares.sum() ** 0.5 / float(before.read(tensor.name).norm()), rel=1e-5)
        pair = adapter.pairs[tensor.name]
        assert (pair.rank, pair.scale) == (8, 1.0)
        left = np.linalg.norm(delta - pair.b.astype(np.float64) @ pair.a)
        assert left == pytest.approx(squares[8:].sum() ** 0.5, rel=1e-5)
        energy, kept = energy + squares.sum(), kept + squares[:8].sum()
    assert report.captured == pytest.approx(kept / energy, abs=1e-6)


def test_what_it_does_not_hold_is_told(llama_model: Path, tmp_path: Path) -> None:
    tuned = tuned_from(llama_model, tmp_path / "tuned", 2, also="input_layernorm")
    report = extract_adapter(llama_model, tuned, tmp_path / "adapter", rank=2, targets="attention")
    assert {t.name.split(".")[-2] for t in report.tensors} == {"q_proj"}
    assert len(report.notes) == 2
    norms, layers = sorted(report.notes, key=lambda note: "layernorm" not in note)
    assert norms.startswith("input_layernorm (2 tensors")
    assert layers.startswith("mlp.down_proj (2 tensors")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (2, 2, ["self_attn.q_proj"])
    assert config["base_model_name_or_path"] == str(llama_model)


def test_packed_models_and_gguf(llama_model: Path, tmp_path: Path) -> None:
    """What counts are decoded weights: here the base's rounding is part of the change."""
    tuned = tuned_from(llama_model, tmp_path / "tuned", 2)
    quantize_checkpoint(llama_model, tmp_path / "base", format="q8_0")
    export_checkpoint(tuned, tmp_path / "tuned.gguf", "gguf")
    report = extract_adapter(tmp_path / "base", tmp_path / "tuned.gguf", tmp_path / "adapter", rank=64)
    before, after = open_checkpoint(tmp_path / "base"), open_checkpoint(tuned)
    for name, pair in read_adapter(tmp_path / "adapter").pairs.items():
        found = before.read(name).double().numpy() + pair.b.astype(np.float64) @ pair.a
        np.testing.assert_allclose(found, after.read(name).double().numpy(), rtol=0, atol=2e-6)
    assert any("embed_tokens" in note for note in report.notes)


def test_what_is_refused(llama_model: Path, make_model, tmp_path: Path) -> None:
    tuned = tuned_from(llama_model, tmp_path / "tuned", 2)
    other = make_model(tmp_path / "wide", "llama", intermediate_size=128)
    gpt2 = make_model(tmp_path / "gpt2", "gpt2")
    out = tmp_path / "out"
    for message, arguments in {
        "nothing to extract": (llama_model, llama_model),
        "mlp.gate_proj.weight is .128, 64., in the base .96, 64.": (llama_model, other),
        "is gpt2, and": (llama_model, gpt2),
        "lies in the model's folder": (llama_model, tuned, tuned / "adapter"),
    }.items():
        base, model, *place = arguments
        with pytest.raises(InputError, match=message):
            extract_adapter(base, model, *(place or [out]), rank=2)
    with pytest.raises(InputError, match="--rank 0"):
        extract_adapter(llama_model, tuned, out, rank=0)
    out.mkdir()
    with pytest.raises(InputError, match="--overwrite"):
        extract_adapter(llama_model, tuned, out, rank=2)
    extract_adapter(llama_model, tuned, out, rank=2, overwrite=True)
    assert len(read_adapter(out).pairs) == 4


def test_the_same_models_give_the_same_files(llama_model: Path, tmp_path: Path) -> None:
    tuned = tuned_from(llama_model, tmp_path / "tuned", None)
    for name in ("one", "two"):
        extract_adapter(llama_model, tuned, tmp_path / name, rank=3)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
