"""A float checkpoint goes in, a packed one comes out, and computes what the dequantized model does to the last bit."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from quantlab import InputError, load_model, quantize_checkpoint
from quantlab.calibration.quantize import TensorReport
from quantlab.formats import FORMATS

TOKENS = torch.arange(2 * 40).reshape(2, 40) * 7 % 512

every_format = pytest.mark.parametrize("format", FORMATS)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(TOKENS).logits


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, by the safetensors library."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def rows_of(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A float linear weight as [out, in]: GPT-2's lie as [in, out]."""
    is_conv1d = name.startswith("transformer.h.") and tensor.ndim == 2
    return tensor.T.contiguous() if is_conv1d else tensor


def gguf_blocks(tensor: torch.Tensor, format: str) -> torch.Tensor:
    kind = gguf.GGMLQuantizationType[format.upper()]
    return torch.from_numpy(gguf.quants.quantize(tensor.to(torch.float32).numpy(), kind))


def gguf_weights(blocks: torch.Tensor, format: str) -> np.ndarray:
    return gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[format.upper()])


def copy_of(model: Path, folder: Path, change=None, **config) -> Path:
    """A copy of a model folder, its tensors changed by `change(tensors)`, fields of config.json by `config`."""
    shutil.copytree(model, folder)
    if change is not None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def packed_names(folder: Path) -> set[str]:
    return {name for name, tensor in tensors_of(folder).items() if tensor.dtype == torch.uint8}


def spread(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, hidden ones too, with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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
    assert message == "unknown format 'q3_k'; choose one of: q4_0, q4_1, q5_0, q5_1, q8_0"
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
