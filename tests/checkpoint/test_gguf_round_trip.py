"""Hugging Face folder -> GGUF -> Hugging Face folder: equal tensors, names, types, configuration and predictions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from quantlab import InputError, load_model, load_tokenizer, open_checkpoint, quantize_checkpoint
from quantlab.checkpoint.export import export_checkpoint
from quantlab.checkpoint.families import FAMILIES
from quantlab.generation.native_engine import load_native

IDS = torch.arange(3, 43).reshape(2, 20)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def logits(folder: Path) -> torch.Tensor:
    with torch.inference_mode():
        return load_model(folder)(input_ids=IDS, use_cache=False).logits


def there_and_back(folder: Path, work: Path) -> tuple[Path, Path]:
    for destination, to, source in ((work / "model.gguf", "gguf", folder), (work / "back", "hf", work / "model.gguf")):
        report = export_checkpoint(source, destination, to)
        assert (report.lossless, report.tensors_changed, report.changed) == (True, 0, ())
    return work / "model.gguf", work / "back"


def assert_same_model(one: Path, other: Path) -> None:
    ours, theirs = open_checkpoint(one), open_checkpoint(other)
    assert set(ours.names) == set(theirs.names)
    assert (ours.tied, ours.family) == (theirs.tied, theirs.family)
    for name in ours.names:
        assert ours.entry(name) == theirs.entry(name)
        assert np.array_equal(ours.read_bytes(name), theirs.read_bytes(name)), name
    assert torch.equal(logits(one), logits(other))


def stored_as(folder: Path, dtype: torch.dtype) -> None:
    """Turn the folder's weights, and its configuration, into a half type."""
    file = folder / "model.safetensors"
    save_file({name: weight.to(dtype) for name, weight in load_file(file).items()}, file, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": str(dtype).removeprefix("torch.")}))


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, make_model, tmp_path_factory) -> Path:
    """A tiny random model of each family."""
    folder = tmp_path_factory.mktemp(request.param)
    return make_model(folder, request.param, tied=FAMILIES[request.param].tied_by_default)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_float_models_come_back_equal(model, dtype, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    stored_as(tmp_path / "model", dtype)
    file, back = there_and_back(tmp_path / "model", tmp_path)
    assert_same_model(tmp_path / "model", back)
    assert torch.equal(logits(file), logits(back))


@pytest.mark.parametrize("uniform", [False, True])
def test_packed_models_come_back_equal(model, uniform, tmp_path):
    quantize_checkpoint(model, tmp_path / "packed", uniform=uniform)
    file, back = there_and_back(tmp_path / "packed", tmp_path)
    assert_same_model(tmp_path / "packed", back)
    assert torch.equal(logits(file), logits(back))
    packed = open_checkpoint(file)
    folder = open_checkpoint(tmp_path / "packed")
    assert {packed.format(name) for name in packed.names} > {None}
    assert all(packed.format(name) == folder.format(name) for name in packed.names)


def test_quantizing_to_gguf_is_quantizing_and_exporting(model, tmp_path):
    straight = quantize_checkpoint(model, tmp_path / "straight.gguf")
    folder = quantize_checkpoint(model, tmp_path / "folder")
    assert straight.tensors == folder.tensors
    export_checkpoint(tmp_path / "folder", tmp_path / "exported.gguf", "gguf")
    one, other = open_checkpoint(tmp_path / "straight.gguf"), open_checkpoint(tmp_path / "exported.gguf")
    assert set(one.names) == set(other.names)
    assert all(np.array_equal(one.read_bytes(name), other.read_bytes(name)) for name in one.names)


def test_the_gguf_package_decodes_what_the_folder_holds(model, tmp_path):
    """The independent reader: every value is in the file, wherever its rows went."""
    quantize_checkpoint(model, tmp_path / "packed")
    export_checkpoint(tmp_path / "packed", tmp_path / "packed.gguf", "gguf")
    ours = open_checkpoint(tmp_path / "packed")
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "packed.gguf").tensors}
    for name in ours.names:
        tensor = theirs[ours.family.gguf_name(name)]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type) - ours.family.gguf_offset(name)
        weight = ours.read(name, torch.float32).numpy()
        assert values.shape == weight.shape
        assert np.allclose(np.sort(values.reshape(-1)), np.sort(weight.reshape(-1)), rtol=0, atol=1e-7)


def test_a_file_without_our_configuration_is_the_same_model(model, tmp_path):
    """Files of other programs hold the architecture's keys alone."""
    export_checkpoint(model, tmp_path / "ours.gguf", "gguf")
    without_own_keys(tmp_path / "ours.gguf", tmp_path / "theirs.gguf")
    family = open_checkpoint(model).family
    assert open_checkpoint(tmp_path / "theirs.gguf").family.gguf == family.gguf
    exact = family.gguf_offset("model.norm.weight") == 0
    difference = (logits(tmp_path / "theirs.gguf") - logits(model)).abs().max()
    assert difference == 0 if exact else difference < 1e-4  # Gemma's norms lose bits when 1 is added


def without_own_keys(source: Path, destination: Path) -> None:
    """Copy a GGUF file by the `gguf` package, but for metadata of quantlab's."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(destination, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "quantlab.")) and key != "general.architecture":
            copy_field(writer, key, field)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def copy_field(writer: gguf.GGUFWriter, key: str, field: gguf.ReaderField) -> None:
    of_items = field.types[-1] if len(field.types) > 1 else None
    writer.add_key_value(key, field.contents(), field.types[0], of_items)


@pytest.mark.parametrize("own_keys", [True, False])
def test_llama_3_scales_its_rotary_embedding(own_keys, make_model, tmp_path):
    folder = make_model(tmp_path / "model", "llama", rope_parameters=LLAMA3)
    file, back = there_and_back(folder, tmp_path)
    assert_same_model(folder, back)
    if not own_keys:
        without_own_keys(file, tmp_path / "theirs.gguf")
        file = tmp_path / "theirs.gguf"
    assert torch.equal(logits(file), logits(folder))
    plain = make_model(tmp_path / "plain", "llama", rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    assert not torch.equal(logits(plain), logits(folder))


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "IQ4_NL"])
def test_other_block_types_are_dequantized(kind, make_model, tmp_path, caplog):
    """By the `gguf` package, to fp32; blocks of random bytes do."""
    folder = make_model(tmp_path / "model", "llama", hidden_size=256, num_attention_heads=8)
    export_checkpoint(folder, tmp_path / "float.gguf", "gguf")
    number = gguf.GGMLQuantizationType[kind]
    blocks = replace_tensor(tmp_path / "float.gguf", tmp_path / "odd.gguf", "blk.0.attn_output.weight", number)
    checkpoint = open_checkpoint(tmp_path / "odd.gguf")
    name = "model.layers.0.self_attn.o_proj.weight"
    expected = gguf.quants.dequantize(blocks, number)
    assert (checkpoint.stored_type(name), checkpoint.stored_bytes(name)) == (kind.lower(), blocks.nbytes)
    assert np.array_equal(checkpoint.read(name).numpy(), expected)
    assert torch.equal(load_model(tmp_path / "odd.gguf").get_parameter(name), torch.from_numpy(expected))
    with caplog.at_level("WARNING"):
        engine = load_native(tmp_path / "odd.gguf", activations="f32", kv="f32")
    assert caplog.messages == [f"{tmp_path / 'odd.gguf'}: {kind.lower()} weights become Q8_0 in memory, row by row"]
    theirs = logits(tmp_path / "odd.gguf")[0].numpy()
    assert np.abs(engine.logits_of(IDS[0].tolist()) - theirs).max() < 0.02 * np.abs(theirs).max()
    report = export_checkpoint(tmp_path / "odd.gguf", tmp_path / "back", "hf")
    assert report.lossless
    assert np.array_equal(open_checkpoint(tmp_path / "back").read(name).numpy(), expected)
    with pytest.raises(InputError, match="is quantized already"):
        quantize_checkpoint(tmp_path / "odd.gguf", tmp_path / "out")


def replace_tensor(source: Path, destination: Path, name: str, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Copy a file with one [256, 256] tensor in blocks of another kind; returns its bytes."""
    reader = gguf.GGUFReader(source)
    random = np.random.default_rng(0)
    weights = random.standard_normal((256, 256), dtype=np.float32)
    size, nbytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = random.integers(0, 64, (256, 256 // size * nbytes), dtype=np.uint8)
    writer = gguf.GGUFWriter(destination, "llama")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key not in ("general.architecture", "quantlab.checksums"):
            copy_field(writer, key, field)
    for tensor in reader.tensors:
        if tensor.name == name:
            assert tensor.data.shape == weights.shape
            writer.add_tensor(name, blocks, raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return blocks


def test_fp64_weights_may_change(llama_model, tmp_path):
    shutil.copytree(llama_model, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"] = weights["model.norm.weight"].double() + 1e-12
    save_file(weights, file, {"format": "pt"})
    report = export_checkpoint(tmp_path / "model", tmp_path / "out.gguf", "gguf")
    assert (report.lossless, report.tensors_changed, report.changed) == (False, 1, ("model.norm.weight",))


def test_a_tied_neox_gets_the_head_that_llama_cpp_demands(make_model, tmp_path):
    folder = make_model(tmp_path / "model", "gpt_neox", tied=True)
    file, back = there_and_back(folder, tmp_path)
    names = [tensor.name for tensor in gguf.GGUFReader(file).tensors]
    assert {"token_embd.weight", "output.weight"} <= set(names)
    assert open_checkpoint(file).tied
    assert_same_model(folder, back)


def test_an_untied_gemma2_has_no_gguf_form(make_model, tmp_path):
    folder = make_model(tmp_path / "model", "gemma2", tied=False)
    with pytest.raises(InputError, match=r"lm_head\.weight: llama\.cpp takes this architecture's embedding"):
        export_checkpoint(folder, tmp_path / "out.gguf", "gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_tokens_and_template_come_back(llama_model, prose, tmp_path):
    shutil.copytree(llama_model, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages[0].content }}\n{# caf\u00e9 #}")
    file, back = there_and_back(tmp_path / "model", tmp_path)
    text = prose.read_text(encoding="utf-8")[:5000]
    expected = load_tokenizer(llama_model)
    for path in (file, back):
        tokenizer = load_tokenizer(path)
        assert tokenizer.encode(text) == expected.encode(text)
        assert (tokenizer.bos, tokenizer.eos) == (expected.bos, expected.eos)
        assert tokenizer.decode(tokenizer.encode(text)) == expected.decode(expected.encode(text))
    assert (back / "chat_template.jinja").read_text() == "{{ messages[0].content }}\n{# caf\u00e9 #}"


@pytest.mark.parametrize(
    ("out", "to", "message"),
    [
        ("out", "gguf", "a GGUF file's name ends in .gguf"),
        ("out.gguf", "hf", "a GGUF file's name ends in .gguf"),
        ("out", "onnx", "--to onnx: choose one of: gguf, hf"),
        ("taken.gguf", "gguf", "exists already"),
    ],
)
def test_requests_that_make_no_sense(llama_model, out, to, message, tmp_path):
    (tmp_path / "taken.gguf").write_bytes(b"precious")
    with pytest.raises(InputError, match=message):
        export_checkpoint(llama_model, tmp_path / out, to)
    assert (tmp_path / "taken.gguf").read_bytes() == b"precious"
    assert [path.name for path in tmp_path.iterdir()] == ["taken.gguf"]
