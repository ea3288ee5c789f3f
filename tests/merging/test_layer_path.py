"""Layer paths: the folded model against transformers' own with the residual stream scaled between its layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from quantlab.checkpoint import open_checkpoint
from quantlab.checkpoint.families import FAMILIES
from quantlab.errors import InputError
from quantlab.merging.layer_path import Slot, cumulative, norm_shift, path_config
from quantlab.merging.merge import merge_checkpoints

LLAMA = FAMILIES["llama"]
PATH = ((0, 0, 1.0), (0, 1, 1.0), (1, 0, 0.7), (1, 1, 1.0), (0, 1, 1.6), (0, 1, 0.8))
NEGATIVE = (*PATH, (1, 1, -1.25), (0, 0, -0.5), (0, 1, -1.0))
LAYERS = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}
CASES = {
    "llama": ("llama", {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
    "tied llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "phi3": ("phi3", {}),
    "gpt2": ("gpt2", {}),
    "parallel neox": ("gpt_neox", {"use_parallel_residual": True}),
    "neox": ("gpt_neox", {"use_parallel_residual": False}),
}


def slots(models: list[Path], path: tuple[tuple[int, int, float], ...]) -> tuple[Slot, ...]:
    return tuple(Slot(str(models[model]), layer, scale) for model, layer, scale in path)


def made(folder: Path, path: tuple[Slot, ...], family: str) -> Path:
    merge_checkpoints(path_config(path, FAMILIES[family]), folder)
    return folder


def logits(folder: Path, family: str, path: tuple[Slot, ...] = ()) -> torch.Tensor:
    """In double precision, the stream multiplied before each layer as the path says."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()

    def scaled(scale: float):
        return lambda layer, arguments, keywords: ((arguments[0] * scale, *arguments[1:]), keywords)

    layers = model.get_submodule(LAYERS.get(family, "model.layers"))
    for layer, slot in zip(layers, path, strict=bool(path)):
        layer.register_forward_pre_hook(scaled(slot.scale), with_kwargs=True)
    ids = torch.arange(24).reshape(2, 12) * 7 % 50 + 3
    with torch.inference_mode():
        return model(ids, use_cache=False).logits


@pytest.mark.parametrize("case", CASES)
def test_the_fold_is_the_scaled_stream(case, make_model, tmp_path):
    """With next to no epsilon: what remains is fp32 rounding of the folded weights."""
    family, settings = CASES[case]
    settings = {**settings, **dict.fromkeys(("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps"), 1e-12)}
    if "tie_word_embeddings" in settings:
        settings["tied"] = settings.pop("tie_word_embeddings")
    models = [make_model(tmp_path / name, family, seed=seed, **settings) for seed, name in enumerate("ab")]
    for name, steps in (("plus", PATH), ("minus", NEGATIVE)):
        path = slots(models, steps)
        bare = made(tmp_path / f"bare {name}", tuple(Slot(slot.model, slot.layer) for slot in path), family)
        folded = made(tmp_path / f"folded {name}", path, family)
        expected = logits(bare, family, path)
        assert float((logits(bare, family) - expected).abs().max()) > 0.01  # the scales matter
        difference = (logits(folded, family) - expected).abs().max() / expected.abs().max()
        assert float(difference) < 1e-6
    assert open_checkpoint(folded).config["num_hidden_layers" if family != "gpt2" else "n_layer"] == len(NEGATIVE)


def test_with_an_ordinary_epsilon(make_model, tmp_path):
    """transformers' default of 1e-6 for Llama: within 1e-5 of the scaled stream's logits, and less than foretold."""
    models = [make_model(tmp_path / name, "llama", seed=seed) for seed, name in enumerate("ab")]
    for model in models:  # embeddings as large as the streams of trained models are behind their first layers
        scale_embedding(model, 1 / 0.15)
    path = slots(models, PATH)
    bare = made(tmp_path / "bare", tuple(Slot(slot.model, slot.layer) for slot in path), "llama")
    expected = logits(bare, "llama", path)
    difference = (logits(made(tmp_path / "folded", path, "llama"), "llama") - expected).abs().max()
    assert float(difference / expected.abs().max()) < 1e-5


def scale_embedding(model: Path, factor: float) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    tensors["model.embed_tokens.weight"] *= factor
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def test_the_shift_of_norms_to_first_order():
    """A stream of mean square 0.5 halved: epsilon counts 4 times, which shortens by (4 - 1) * epsilon / (2 * 0.5)."""
    path = (Slot("a", 0), Slot("a", 0, 0.5))
    assert norm_shift(path, 1e-6, 0.5) == pytest.approx(3e-6)
    exact = (0.5 + 1e-6) ** 0.5 / (0.5 + 4e-6) ** 0.5
    assert norm_shift(path, 1e-6, 0.5) == pytest.approx(1 - exact, rel=1e-4)
    assert norm_shift((Slot("a", 0), Slot("a", 1, -1.0)), 1e-6, 0.5) == 0


def test_the_config_by_hand():
    """Neighbours join in one slice; scales multiply; what follows the last layer takes the last sign."""
    path = (Slot("a", 0), Slot("a", 1), Slot("b", 1, 2.0), Slot("b", 2), Slot("a", 3, -0.25))
    assert cumulative(path) == [1, 1, 2, 2, -0.5]
    found = yaml.safe_load(path_config(path, LLAMA, chat_template="auto"))
    last = [{"filter": "model.norm.weight", "value": -1.0}]
    last += [{"filter": name, "value": -2.0} for name in ("self_attn.o_proj.", "mlp.down_proj.")]
    last += [{"filter": f"{name}_layernorm.weight", "value": -1.0} for name in ("input", "post_attention")]
    half = [{"filter": name, "value": 0.5} for name in ("self_attn.o_proj.", "mlp.down_proj.")]
    assert found == {
        "merge_method": "passthrough",
        "dtype": "float32",
        "chat_template": "auto",
        "slices": [
            {"sources": [{"model": "a", "layer_range": [0, 2]}]},
            {"sources": [{"model": "b", "layer_range": [1, 3], "parameters": {"scale": [*half, {"value": 1.0}]}}]},
            {"sources": [{"model": "a", "layer_range": [3, 4], "parameters": {"scale": [*last, {"value": 1.0}]}}]},
        ],
    }
    assert "dtype" not in yaml.safe_load(path_config(path[:2], LLAMA))
    assert yaml.safe_load(path_config(path, LLAMA, dtype="bfloat16"))["dtype"] == "bfloat16"


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_post_norms_are_refused(family):
    with pytest.raises(InputError, match=f"{family}: its layers have norms behind attention and MLP"):
        path_config((Slot("a", 0),), FAMILIES[family])


def test_paths_that_lead_nowhere():
    with pytest.raises(InputError, match="at least one layer"):
        path_config((), LLAMA)
    with pytest.raises(InputError, match="the scales up to place 1 multiply to 0"):
        path_config((Slot("a", 0), Slot("a", 1, 0.0)), LLAMA)
