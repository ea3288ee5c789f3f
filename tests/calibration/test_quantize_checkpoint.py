"""A float checkpoint goes in, a packed one comes out, and computes what the dequantized model does to the last bit."""

from __future__ import annotations

import json
import re

import gguf
import numpy as np
import pytest
import torch
from model_folders import copy_of, gguf_blocks, logits, packed_names, rows_of, spread, tensors_of
from transformers import AutoModelForCausalLM

from quantlab import load_model, quantize_checkpoint
from quantlab.calibration.quantize import TensorReport
from quantlab.formats import FORMATS

OWN_SCALES = [name for name, row in FORMATS.items() if row.scale_of == "block"]
every_format = pytest.mark.parametrize("format", OWN_SCALES)


def gguf_weights(blocks: torch.Tensor, format: str) -> np.ndarray:
    return gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[format.upper()])


# The promise.


@every_format
def test_the_quantized_model_is_the_dequantized_model_to_the_last_bit(float_model, format, float_twin, tmp_path):
    """Logits differ by 0 from transformers' own float model with gguf's decoded weights in it."""
    out = tmp_path / "out"
    quantize_checkpoint(float_model, out, format=format)
    result = logits(load_model(out))
    assert torch.equal(result, logits(float_twin(out)))
    assert not torch.equal(result, logits(load_model(float_model)))


def test_it_is_so_in_bf16_too(float_model, float_twin, tmp_path):
    quantize_checkpoint(float_model, tmp_path / "out")
    result = logits(load_model(tmp_path / "out", dtype=torch.bfloat16))
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, logits(float_twin(tmp_path / "out", torch.bfloat16)))


@every_format
def test_packed_bytes_are_ggufs_and_the_rest_is_copied(float_model, format, tmp_path):
    out = tmp_path / "out"
    report = quantize_checkpoint(float_model, out, format=format)
    source, written = tensors_of(float_model), tensors_of(out)
    assert set(written) == set(source)
    for tensor in report.tensors:
        stored, original = written[tensor.name], source[tensor.name]
        if tensor.format in FORMATS:
            assert torch.equal(stored, gguf_blocks(rows_of(tensor.name, original), tensor.format))
        else:
            assert stored.dtype == original.dtype == torch.float32
            assert torch.equal(stored, original)


@pytest.mark.parametrize("uniform", [False, True], ids=["default", "uniform"])
def test_matrices_take_the_format_and_embedding_and_head_q8_0_unless_uniform(float_model, uniform, tmp_path):
    report = quantize_checkpoint(float_model, tmp_path / "out", format="q4_0", uniform=uniform)
    formats = {tensor.name: tensor.format for tensor in report.tensors}
    vocabulary = {"model.embed_tokens.weight", "transformer.wte.weight", "lm_head.weight"} & set(formats)
    layers = {name for name in formats if re.search(r"\.(\w+_proj|c_attn|c_fc)\.weight$", name)}
    assert {formats[name] for name in vocabulary} == {"q4_0" if uniform else "q8_0"}
    assert {formats[name] for name in layers} == {"q4_0"}
    assert {formats[name] for name in set(formats) - vocabulary - layers} == {"f32"}
    assert packed_names(tmp_path / "out") == vocabulary | layers


def test_a_uniform_model_is_the_dequantized_model_too(float_model, float_twin, tmp_path):
    quantize_checkpoint(float_model, tmp_path / "out", uniform=True)
    assert torch.equal(logits(load_model(tmp_path / "out")), logits(float_twin(tmp_path / "out")))


# The report.


def test_the_reports_numbers_are_those_of_the_files(float_model, tmp_path):
    out = tmp_path / "out"
    report = quantize_checkpoint(float_model, out)
    written = tensors_of(out)
    assert report.parameters == AutoModelForCausalLM.from_pretrained(float_model).num_parameters()
    assert report.bytes == sum(tensor.nbytes for tensor in written.values())
    assert report.bits_per_weight == 8 * report.bytes / report.parameters
    assert report.source_bytes == 4 * report.parameters
    assert {tensor.name for tensor in report.tensors} == set(written)


def test_bits_per_weight_by_hand(llama_model, tmp_path):
    """q4_1 throughout, but for five norms of 64 in fp32."""
    report = quantize_checkpoint(llama_model, tmp_path / "out", uniform=True)
    attention, feed_forward = 2 * 64 * 64 + 2 * 64 * 32, 3 * 64 * 96
    packed = 512 * 64 + 2 * (attention + feed_forward)
    assert report.parameters == packed + 5 * 64
    assert report.bits_per_weight == (5 * packed + 32 * 5 * 64) / report.parameters


@every_format
def test_relative_errors_are_those_of_ggufs_weights(float_model, format, tmp_path):
    out = tmp_path / "out"
    report = quantize_checkpoint(float_model, out, format=format)
    source, written = tensors_of(float_model), tensors_of(out)
    for tensor in report.tensors:
        weights = rows_of(tensor.name, source[tensor.name]).to(torch.float64).numpy()
        assert tensor.shape == weights.shape
        if tensor.format in FORMATS:
            decoded = gguf_weights(written[tensor.name], tensor.format)
            expected = np.linalg.norm(decoded - weights) / np.linalg.norm(weights)
            assert tensor.relative_error == pytest.approx(expected, rel=1e-6)
        else:
            assert tensor.relative_error == 0
        assert tensor.note is None


@pytest.mark.parametrize(
    ("family", "width", "odd"),
    [("llama", "intermediate_size", "model.layers.{}.mlp.down_proj.weight"),
     ("gpt2", "n_inner", "transformer.h.{}.mlp.c_proj.weight")],
)  # fmt: skip
def test_rows_that_are_no_whole_blocks_stay_float_with_a_note(family, width, odd, make_model, float_twin, tmp_path):
    """The second feed-forward matrix has rows of 72 weights; the model runs as ever."""
    source = make_model(tmp_path / "model", family, **{width: 72})
    report = quantize_checkpoint(source, tmp_path / "out")
    tensors = {tensor.name: tensor for tensor in report.tensors}
    for name in (odd.format(0), odd.format(1)):
        note = "rows of 72 are no multiple of 32"
        assert tensors.pop(name) == TensorReport(name, (64, 72), "f32", relative_error=0.0, note=note)
        assert torch.equal(tensors_of(tmp_path / "out")[name], tensors_of(source)[name])
    assert {tensor.note for tensor in tensors.values()} == {None}
    assert torch.equal(logits(load_model(tmp_path / "out")), logits(float_twin(tmp_path / "out")))


def test_a_dry_run_reports_the_same_and_writes_nothing(float_model, tmp_path):
    dry = quantize_checkpoint(float_model, tmp_path / "dry", dry_run=True)
    assert list(tmp_path.iterdir()) == []
    wet = quantize_checkpoint(float_model, tmp_path / "wet")
    assert (dry.parameters, dry.bytes, dry.bits_per_weight) == (wet.parameters, wet.bytes, wet.bits_per_weight)
    assert [(t.name, t.shape, t.format) for t in dry.tensors] == [(t.name, t.shape, t.format) for t in wet.tensors]
    assert {tensor.relative_error for tensor in dry.tensors} == {None}


@pytest.mark.parametrize("options", [{}, {"format": "q8_0", "uniform": True}], ids=["mixed", "uniform"])
def test_a_dry_run_knows_the_size_of_a_gguf_file(float_model, options, tmp_path):
    """Metadata, padding, norms in fp32 and a head of its own included."""
    dry = quantize_checkpoint(float_model, tmp_path / "out.gguf", dry_run=True, **options)
    assert list(tmp_path.iterdir()) == []
    wet = quantize_checkpoint(float_model, tmp_path / "out.gguf", **options)
    assert dry.file_bytes == wet.file_bytes == (tmp_path / "out.gguf").stat().st_size
    assert (dry.bytes, dry.bits_per_weight) == (wet.bytes, wet.bits_per_weight)
    assert dry.bytes == sum(tensor.n_bytes for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors)


def test_a_folder_is_no_file(llama_model, tmp_path):
    assert quantize_checkpoint(llama_model, tmp_path / "out", dry_run=True).file_bytes is None
    assert quantize_checkpoint(llama_model, tmp_path / "out").file_bytes is None


def test_progress_counts_weights_up_to_the_last(llama_model, tmp_path):
    calls: list[tuple[int, int, str]] = []
    report = quantize_checkpoint(llama_model, tmp_path / "out", progress=lambda *call: calls.append(call))
    done, totals, names = zip(*calls, strict=True)
    assert list(done) == sorted(done)
    assert (done[0], done[-1]) == (0, report.parameters)
    assert set(totals) == {report.parameters}
    assert names == (*(tensor.name for tensor in report.tensors), "")


# The folder.


def test_the_config_is_the_models_with_the_recipe_added(float_model, tmp_path):
    quantize_checkpoint(float_model, tmp_path / "out", format="q5_0")
    source = json.loads((float_model / "config.json").read_text())
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    quantization = written.pop("quantization_config")
    assert written == source
    assert (quantization["quant_method"], quantization["rules_version"], quantization["method"]) == (
        "quantlab",
        1,
        "rtn",
    )
    assert {format for _, format in quantization["rules"]} == {"q5_0", "q8_0"}


def test_tokenizer_template_and_generation_settings_are_copied(llama_model, tmp_path):
    """Everything that is needed to use the model; neither code nor the leftovers of training."""
    source = copy_of(llama_model, tmp_path / "model")
    (source / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (source / "generation_config.json").write_text('{"temperature": 0.7}')
    (source / "LICENSE").write_text("Public domain")
    for leftover in ("modeling_custom.py", "optimizer.pt", "training_args.bin"):
        (source / leftover).write_bytes(b"leftover")
    quantize_checkpoint(source, tmp_path / "out")
    expected, written = spread(source), spread(tmp_path / "out")
    companions = {"tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja"}
    companions |= {"generation_config.json", "LICENSE"}
    assert set(written) == companions | {"checksums.json", "config.json", "model.safetensors"}
    assert {name: written[name] for name in companions} == {name: expected[name] for name in companions}


def test_the_source_is_left_alone(llama_model, tmp_path):
    before = spread(llama_model)
    quantize_checkpoint(llama_model, tmp_path / "out")
    assert spread(llama_model) == before
