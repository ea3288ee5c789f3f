"""Every family beside GPT-2 and Llama: quantized, reloaded, and equal to the float model with the same weights."""

from __future__ import annotations

import pytest
import torch

from quantlab import InputError, load_model, open_checkpoint, quantize_checkpoint
from quantlab.checkpoint.families import FAMILIES

OTHERS = ("mistral", "qwen2", "qwen3", "gpt_neox", "phi3", "gemma2", "gemma3_text")
IDS = torch.arange(3, 43).reshape(2, 20)  # longer than the sliding windows


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.fixture(scope="module", params=OTHERS)
def family_model(request, make_model, tmp_path_factory):
    """A tiny random model of the family, tied as the family is by default."""
    tied = FAMILIES[request.param].tied_by_default
    folder = tmp_path_factory.mktemp(request.param)
    return make_model(folder, request.param, tied=tied)


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
    folder = make_model(tmp_path / "neox", "gpt_neox", tied=False)
    assert "lm_head.weight" in open_checkpoint(folder).names
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        assert "embed_out.weight" in file.keys()  # noqa: SIM118 the library's object is no mapping


HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.mark.parametrize(
    ("family", "name", "order"),
    [
        # Two heads of four rows: each head's halves become pairs of neighbours.
        ("llama", "model.layers.3.self_attn.q_proj.weight", [0, 2, 1, 3, 4, 6, 5, 7]),
        ("mistral", "model.layers.3.self_attn.q_proj.bias", [0, 2, 1, 3, 4, 6, 5, 7]),
        # One key head of eight rows.
        ("llama", "model.layers.3.self_attn.k_proj.weight", [0, 4, 1, 5, 2, 6, 3, 7]),
        # Two heads of (query, key, value) with two rows each: all queries first.
        ("gpt_neox", "gpt_neox.layers.0.attention.query_key_value.weight", [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]),
    ],
)
def test_row_orders_by_hand(family, name, order):
    assert FAMILIES[family].gguf_rows(name, len(order), HEADS).tolist() == order


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "model.layers.3.self_attn.v_proj.weight"),
        ("qwen2", "model.layers.3.self_attn.q_proj.weight"),
        ("phi3", "model.layers.3.self_attn.qkv_proj.weight"),
        ("gpt2", "transformer.h.0.attn.c_attn.weight"),
    ],
)
def test_other_rows_stay(family, name):
    assert FAMILIES[family].gguf_rows(name, 12, HEADS) is None


def test_rows_that_are_no_whole_heads_are_refused():
    with pytest.raises(InputError, match=r"q_proj\.weight: 6 rows are no whole number of 2 heads"):
        FAMILIES["llama"].gguf_rows("model.layers.0.self_attn.q_proj.weight", 6, HEADS)


@pytest.mark.parametrize(
    ("family", "name", "gguf_name"),
    [
        ("gpt2", "transformer.h.11.mlp.c_fc.bias", "blk.11.ffn_up.bias"),
        ("gpt_neox", "gpt_neox.layers.0.post_attention_layernorm.weight", "blk.0.ffn_norm.weight"),
        ("llama", "model.layers.0.post_attention_layernorm.weight", "blk.0.ffn_norm.weight"),
        ("gemma2", "model.layers.0.post_attention_layernorm.weight", "blk.0.post_attention_norm.weight"),
        ("gemma3_text", "model.layers.25.pre_feedforward_layernorm.weight", "blk.25.ffn_norm.weight"),
        ("qwen3", "model.layers.7.self_attn.k_norm.weight", "blk.7.attn_k_norm.weight"),
        ("phi3", "model.layers.7.mlp.gate_up_proj.weight", "blk.7.ffn_up.weight"),
        ("llama", "model.norm.weight", "output_norm.weight"),
    ],
)
def test_names_there_and_back(family, name, gguf_name):
    assert FAMILIES[family].gguf_name(name) == gguf_name
    assert FAMILIES[family].name_of_gguf(gguf_name) == name


@pytest.mark.parametrize("name", ["blk.0.ffn_up_exps.weight", "blk.weight", "x", "", "blk.0.blk.1.attn_q.weight"])
def test_names_of_nothing(name):
    assert FAMILIES["llama"].name_of_gguf(name) is None
