"""What a checkpoint holds, counted by hand and against the files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantlab
from quantlab.checkpoint.summary import TensorSummary, summarize
from quantlab.errors import InputError


def test_a_summary_of_a_float_model(float_model: Path) -> None:
    """fp32 throughout: 32 bits per weight, every parameter of the file once, its class as architecture."""
    summary = summarize(float_model)
    stored = load_file(float_model / "model.safetensors")
    config = json.loads((float_model / "config.json").read_text())
    assert [summary.architecture] == config["architectures"]
    assert {tensor.name for tensor in summary.tensors} == set(stored)
    assert summary.parameters == sum(tensor.numel() for tensor in stored.values())
    assert summary.bytes == sum(tensor.bytes for tensor in summary.tensors) == 4 * summary.parameters
    assert summary.bits_per_weight == 32
    assert summary.tied_head == config["tie_word_embeddings"]
    assert {tensor.format for tensor in summary.tensors} == {"f32"}


def test_a_worked_example(llama_model: Path, tmp_path: Path) -> None:
    """The tiny Llama in Q4_1: 64 wide, 96 inner, 2 layers, 4 heads of which 2 hold keys, 512 tokens, tied.

    Linear weights have 5 bits each, the embedding 8.5, the five norms 32.
    """
    quantlab.quantize_checkpoint(llama_model, tmp_path / "out", format="q4_1")
    summary = summarize(tmp_path / "out")
    linear = 2 * (64 * 64 * 2 + 32 * 64 * 2 + 3 * 64 * 96)
    embedding, norms = 512 * 64, 5 * 64
    assert summary.parameters == linear + embedding + norms
    assert 8 * summary.bytes == 5 * linear + 8.5 * embedding + 32 * norms
    assert summary.bits_per_weight == pytest.approx(8 * summary.bytes / summary.parameters, rel=1e-15)
    assert summary.tied_head
    tensors = {tensor.name: tensor for tensor in summary.tensors}
    name = "model.layers.1.mlp.down_proj.weight"
    assert tensors[name] == TensorSummary(name, (64, 96), "q4_1", 64 * 96 // 32 * 20)
    name = "model.embed_tokens.weight"
    assert tensors[name] == TensorSummary(name, (512, 64), "q8_0", 512 * 64 // 32 * 34)
    assert tensors["model.norm.weight"] == TensorSummary("model.norm.weight", (64,), "f32", 256)


def test_shapes_are_those_of_the_weights(make_model, tmp_path: Path) -> None:
    """[out, in] for GPT-2's linear weights, packed or not."""
    folder = make_model(tmp_path / "float", "gpt2")
    quantlab.quantize_checkpoint(folder, tmp_path / "packed", format="q5_0")
    shapes = [{t.name: t.shape for t in summarize(path).tensors} for path in (folder, tmp_path / "packed")]
    assert shapes[0] == shapes[1]
    assert shapes[0]["transformer.h.0.attn.c_attn.weight"] == (192, 64)


@pytest.mark.parametrize("architectures", [None, [], "LlamaForCausalLM", [3]])
def test_without_a_class_the_model_type_is_the_architecture(tmp_path: Path, architectures: object) -> None:
    save_file({"lm_head.weight": torch.ones(2, 2, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": architectures}))
    summary = summarize(tmp_path)
    assert summary.architecture == "llama"
    assert summary.tensors == (TensorSummary("lm_head.weight", (2, 2), "bf16", 8),)


def test_a_checkpoint_without_tensors_has_a_summary(tmp_path: Path) -> None:
    save_file({}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    summary = summarize(tmp_path)
    assert (summary.parameters, summary.bytes, summary.bits_per_weight, summary.tensors) == (0, 0, 0, ())


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{tmp_path}: holds no config.json"):
        summarize(tmp_path)
