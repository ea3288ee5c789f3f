"""Every family beside GPT-2 and Llama: quantized, reloaded, and equal to the float model with the same weights."""

from __future__ import annotations

import pytest
import torch

from quantlab import load_model, open_checkpoint, quantize_checkpoint
from quantlab.checkpoint.families import FAMILIES

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
ONE_HEAD_A_KEY = {name: value for name, value in SHAPE.items() if name != "num_key_value_heads"}
CASES = {
    "mistral": {**SHAPE, "sliding_window": 8},
    "qwen2": SHAPE,
    "qwen3": {**SHAPE, "head_dim": 32},
    "gpt_neox": ONE_HEAD_A_KEY,
    "phi3": {**SHAPE, "pad_token_id": 0},
    "gemma2": {**SHAPE, "head_dim": 16, "sliding_window": 8},
    "gemma3_text": {**SHAPE, "head_dim": 16, "sliding_window": 8, "sliding_window_pattern": 2},
}
IDS = torch.arange(3, 43).reshape(2, 20)  # longer than the sliding windows


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.fixture(scope="module", params=CASES)
def family_model(request, make_model, tmp_path_factory):
    """A tiny random model of the family, tied as the family is by default."""
    tied = FAMILIES[request.param].tied_by_default
    folder = tmp_path_factory.mktemp(request.param)
    return make_model(folder, request.param, tied=tied, model_type=request.param, **CASES[request.param])


@pytest.mark.parametrize("uniform", [False, True])
def test_logits_are_those_of_the_dequantized_weights(family_model, uniform, float_twin, tmp_path):
    report = quantize_checkpoint(family_model, tmp_path / "out", uniform=uniform)
    assert torch.equal(logits(load_model(tmp_path / "out")), logits(float_twin(tmp_path / "out")))
    packed = {t.name for t in report.tensors if t.format == "q4_1"}
    unpacked = {t.name for t in report.tensors if len(t.shape) == 2} - packed
    family = open_checkpoint(family_model).family
    assert unpacked == (set() if uniform else {family.embedding, family.head} & {t.name for t in report.tensors})


def test_dequantize_gives_the_float_model_back(family_model, tmp_path):
    """transformers' own `dequantize`, embeddings' scale included."""
    quantize_checkpoint(family_model, tmp_path / "out", uniform=True)
    model = load_model(tmp_path / "out")
    packed = logits(model)
    assert torch.equal(logits(model.dequantize(torch.float32)), packed)


def test_save_pretrained_keeps_the_bytes(family_model, tmp_path):
    quantize_checkpoint(family_model, tmp_path / "out")
    load_model(tmp_path / "out").save_pretrained(tmp_path / "again")
    one, other = open_checkpoint(tmp_path / "out"), open_checkpoint(tmp_path / "again")
    assert sorted(one.names) == sorted(other.names)
    assert all((one.read_bytes(name) == other.read_bytes(name)).all() for name in one.names)


def test_neox_files_may_call_the_head_embed_out(make_model, tmp_path):
    """Pythia's files on the hub do."""
    folder = make_model(tmp_path / "neox", "gpt_neox", tied=False, model_type="gpt_neox", **ONE_HEAD_A_KEY)
    assert "lm_head.weight" in open_checkpoint(folder).names
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        assert "embed_out.weight" in file.keys()  # noqa: SIM118 the library's object is no mapping
