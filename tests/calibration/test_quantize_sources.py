"""Every kind of float checkpoint is quantized; what cannot be is refused in one line, and nothing is left behind."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from model_folders import copy_of, gguf_blocks, logits, packed_names, rows_of, spread, tensors_of
from transformers import AutoConfig, AutoModelForCausalLM

from quantlab import InputError, load_model, quantize_checkpoint
from quantlab.formats import FORMATS

# Other kinds of source.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_half_precision_sources(family, dtype, make_model, float_twin, tmp_path):
    """Packed from their exact values; what is not packed stays in 16 bits on disk, and models load in fp32."""
    full = make_model(tmp_path / "full", family)
    source = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(full, dtype=dtype).save_pretrained(source)
    report = quantize_checkpoint(source, tmp_path / "out")
    halves, written = tensors_of(source), tensors_of(tmp_path / "out")
    assert {tensor.dtype for tensor in halves.values()} == {dtype}
    for tensor in report.tensors:
        original = halves[tensor.name]
        packed = tensor.format in FORMATS
        expected = gguf_blocks(rows_of(tensor.name, original), tensor.format) if packed else original
        assert torch.equal(written[tensor.name], expected)
    assert report.source_bytes == 2 * report.parameters
    result = logits(load_model(tmp_path / "out"))
    assert result.dtype == torch.float32
    assert torch.equal(result, logits(float_twin(tmp_path / "out")))


def test_sharded_sources(float_model, tmp_path):
    source = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(float_model).save_pretrained(source, max_shard_size="60KB")
    assert len(list(source.glob("model-*.safetensors"))) > 2
    quantize_checkpoint(source, tmp_path / "out")
    quantize_checkpoint(float_model, tmp_path / "expected")
    written, expected = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "expected")
    assert set(written) == set(expected)
    assert all(torch.equal(written[name], expected[name]) for name in expected)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old pickle"])
def test_legacy_torch_files(float_model, zipped, tmp_path):
    source = tmp_path / "legacy"
    source.mkdir()
    shutil.copy(float_model / "config.json", source)
    torch.save(tensors_of(float_model), source / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    quantize_checkpoint(source, tmp_path / "out")
    quantize_checkpoint(float_model, tmp_path / "expected")
    written, expected = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "expected")
    assert set(written) == set(expected)
    assert all(torch.equal(written[name], expected[name]) for name in expected)


def test_gpt2_as_the_hub_has_it(make_model, tmp_path):
    """Names without `transformer.`, and the causal masks stored as if they were weights: both are mended."""
    model = make_model(tmp_path / "model", "gpt2")

    def as_on_the_hub(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        for layer in range(2):
            tensors[f"h.{layer}.attn.bias"] = torch.ones(128, 128).tril().reshape(1, 1, 128, 128)
            tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)

    hub = copy_of(model, tmp_path / "hub", as_on_the_hub)
    report = quantize_checkpoint(hub, tmp_path / "out")
    expected_report = quantize_checkpoint(model, tmp_path / "expected")
    written, expected = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "expected")
    assert set(written) == set(expected)
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    assert report.parameters == expected_report.parameters
    assert torch.equal(logits(load_model(tmp_path / "out")), logits(load_model(tmp_path / "expected")))


def test_a_stored_copy_of_a_tied_head_is_dropped(llama_model, tmp_path):
    def add_copy(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    report = quantize_checkpoint(copy_of(llama_model, tmp_path / "model", add_copy), tmp_path / "out")
    expected = quantize_checkpoint(llama_model, tmp_path / "expected")
    assert (report.parameters, report.bytes) == (expected.parameters, expected.bytes)
    assert "lm_head.weight" not in tensors_of(tmp_path / "out")


def test_a_head_that_differs_is_kept_although_the_config_calls_it_tied(make_model, float_twin, tmp_path):
    """transformers unties such a model when it loads it; so does the written config."""
    untied = make_model(tmp_path / "untied", "llama", tied=False)
    mislabelled = copy_of(untied, tmp_path / "mislabelled", tie_word_embeddings=True)
    quantize_checkpoint(mislabelled, tmp_path / "out")
    assert AutoConfig.from_pretrained(tmp_path / "out").tie_word_embeddings is False
    quantize_checkpoint(untied, tmp_path / "expected")
    assert torch.equal(logits(load_model(tmp_path / "out")), logits(float_twin(tmp_path / "expected")))


# Refusals.


def refusal(model, out: Path, **options) -> str:
    """The error's single line."""
    with pytest.raises(InputError) as error:
        quantize_checkpoint(model, out, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_existing_folder_of_someone_else_is_refused(llama_model, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    assert refusal(llama_model, out) == f"{out}: exists already; choose another name or pass --overwrite"
    assert spread(tmp_path) == {"out/thesis.txt": b"years of work"}


def test_a_float_model_is_someone_elses_too(llama_model, tmp_path):
    out = copy_of(llama_model, tmp_path / "out")
    before = spread(tmp_path)
    assert "exists already" in refusal(llama_model, out)
    assert spread(tmp_path) == before


def test_an_existing_folder_is_replaced_on_request(llama_model, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("a copy")
    quantize_checkpoint(llama_model, out, overwrite=True)
    assert not (out / "thesis.txt").exists()
    assert packed_names(out)
    assert list(tmp_path.iterdir()) == [out]


def test_our_own_output_is_replaced(llama_model, float_twin, tmp_path):
    out = tmp_path / "out"
    quantize_checkpoint(llama_model, out, format="q8_0")
    (out / "stale.txt").write_text("from the first run")
    quantize_checkpoint(llama_model, out, format="q4_0")
    assert not (out / "stale.txt").exists()
    assert list(tmp_path.iterdir()) == [out]
    fresh = tmp_path / "fresh"
    quantize_checkpoint(llama_model, fresh, format="q4_0")
    assert spread(out) == spread(fresh)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["model", "link", "model/../model", "."])
def test_the_model_itself_and_folders_around_it_are_never_replaced(llama_model, name, overwrite, tmp_path):
    model = copy_of(llama_model, tmp_path / "model")
    (tmp_path / "link").symlink_to(model)
    before = spread(tmp_path)
    message = refusal(model, tmp_path / name, overwrite=overwrite)
    assert message == f"{tmp_path / name}: is the model itself, or a folder around it; choose another name"
    assert spread(tmp_path) == before


def test_a_quantized_model_is_not_quantized_again(llama_model, tmp_path):
    quantize_checkpoint(llama_model, tmp_path / "once")
    message = refusal(tmp_path / "once", tmp_path / "twice")
    assert message == f"{tmp_path / 'once'}: is quantized already; start from the original model"
    assert not (tmp_path / "twice").exists()


def test_unknown_formats_and_methods_are_answered_with_those_there_are(llama_model, tmp_path):
    message = refusal(llama_model, tmp_path / "out", format="q3_k")
    assert message == "unknown format 'q3_k'; choose one of: q4_0, q4_1, q5_0, q5_1, q8_0, tq2_0, ternary"
    message = refusal(llama_model, tmp_path / "out", method="magic")
    assert message == "unknown method 'magic'; choose one of: rtn, search, gptq, learned"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("model", ["nowhere", "nowhere/at/all"])
def test_a_model_that_is_not_there(model, tmp_path):
    assert refusal(tmp_path / model, tmp_path / "out") == f"{tmp_path / model}: no such folder or file"


DAMAGE = {
    "nan": (float("nan"), "row 3, column 5 is nan; the checkpoint is damaged"),
    "infinity": (float("-inf"), "row 3, column 5 is -inf; the checkpoint is damaged"),
    "overflow": (
        1e9,
        "row 3, columns 0 to 31: the q4_1 scale overflows fp16 (weights reach 1e+09); leave this tensor unquantized",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_weights_that_cannot_be_packed_are_named_and_nothing_is_left(llama_model, kind, tmp_path):
    value, reason = DAMAGE[kind]
    name = "model.layers.1.mlp.up_proj.weight"

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][3, 5] = value

    model = copy_of(llama_model, tmp_path / "model", damage)
    before = spread(tmp_path)
    assert refusal(model, tmp_path / "out") == f"{model}: {name}: {reason}"
    assert list(tmp_path.iterdir()) == [model]
    assert spread(tmp_path) == before


def test_damage_in_a_copied_tensor_is_named_too(llama_model, tmp_path):
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"][7] = float("inf")

    model = copy_of(llama_model, tmp_path / "model", damage)
    message = refusal(model, tmp_path / "out")
    assert message == f"{model}: model.norm.weight: holds NaN or infinity; the checkpoint is damaged"
    assert list(tmp_path.iterdir()) == [model]


def test_damage_in_a_conv1d_is_named_by_its_row_and_column_as_a_linear_weight(make_model, tmp_path):
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors["transformer.h.0.mlp.c_fc.weight"][3, 5] = float("nan")  # [in, out]

    model = copy_of(make_model(tmp_path / "sound", "gpt2"), tmp_path / "model", damage)
    message = refusal(model, tmp_path / "out")
    assert message == f"{model}: transformer.h.0.mlp.c_fc.weight: row 5, column 3 is nan; the checkpoint is damaged"


def test_a_failed_run_leaves_the_earlier_output(llama_model, tmp_path):
    out = tmp_path / "out"
    quantize_checkpoint(llama_model, out, format="q8_0")
    before = spread(tmp_path)

    def interrupt(done: int, total: int, name: str) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(llama_model, out, format="q4_0", progress=interrupt)
    assert spread(tmp_path) == before
