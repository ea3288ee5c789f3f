"""load_model gives a model ready to run, or one line that says what is wrong with its files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from quantlab import InputError, load_model, quantize_checkpoint
from quantlab.checkpoint import families
from quantlab.nn import QuantLinear

TOKENS = torch.arange(40).reshape(2, 20) * 7 % 512


@pytest.fixture(scope="module")
def packed(float_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "model"
    quantize_checkpoint(float_model, folder)
    return folder


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(TOKENS).logits


def altered(model: Path, folder: Path, change=None, **config) -> Path:
    """A copy of a model folder, its tensors changed by `change(tensors)`, fields of config.json by `config`."""
    shutil.copytree(model, folder)
    if change is not None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def refusal(model) -> str:
    """The error's single line."""
    with pytest.raises(InputError) as error:
        load_model(model)
    assert "\n" not in str(error.value)
    return str(error.value)


# What it gives.


def test_a_float_folder_loads_as_transformers_loads_it(float_model):
    model = load_model(float_model)
    assert not model.training
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(float_model).eval()))


def test_a_quantized_folder_loads_as_its_dequantized_twin(packed, float_twin):
    model = load_model(packed)
    assert not model.training
    assert torch.equal(logits(model), logits(float_twin(packed)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_activations_and_what_is_not_packed_are_in_the_dtype(packed, dtype):
    model = load_model(packed, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.uint8, dtype}
    assert logits(model).dtype == dtype


def test_the_dtype_is_fp32_unless_asked_whatever_the_file_holds(llama_model, tmp_path):
    AutoModelForCausalLM.from_pretrained(llama_model, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    quantize_checkpoint(tmp_path / "half", tmp_path / "packed")
    for folder in ("half", "packed"):
        assert logits(load_model(tmp_path / folder)).dtype == torch.float32


def test_paths_may_be_strings_and_devices_names(packed):
    model = load_model(str(packed), device="cpu")
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


# int8 activations.


def test_int8_activations_reach_every_packed_layer_and_come_near(packed):
    """A tied head is one of them, though its blocks are the embedding's."""
    model, exact = load_model(packed, activations="int8"), load_model(packed)
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert model.get_output_embeddings() in layers
    assert {layer.activations for layer in layers} == {"int8"}
    found, expected = logits(model), logits(exact)
    assert not torch.equal(found, expected)
    error = (found - expected).norm() / expected.norm()
    assert error < 0.02


def test_activations_are_float_unless_asked(packed):
    default, asked = load_model(packed), load_model(packed, activations="float")
    assert torch.equal(logits(default), logits(asked))


def test_int8_activations_add_no_weights(packed):
    """Only the packed bytes, before a forward pass and after it."""
    model, exact = load_model(packed, activations="int8"), load_model(packed)
    logits(model)
    held = {name: (tensor.dtype, tensor.shape) for name, tensor in model.state_dict().items()}
    assert held == {name: (tensor.dtype, tensor.shape) for name, tensor in exact.state_dict().items()}


def test_int8_activations_are_not_saved(packed, tmp_path):
    load_model(packed, activations="int8").save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load_model(tmp_path / "again")), logits(load_model(packed)))


def test_activations_that_do_not_exist_are_refused(packed):
    with pytest.raises(InputError, match="activations 'int4': choose one of: float, int8"):
        load_model(packed, activations="int4")


def test_int8_activations_on_another_device_are_refused(packed):
    with pytest.raises(InputError, match="on the CPU only, not on cuda; choose device='cpu'"):
        load_model(packed, activations="int8", device="cuda")


def test_int8_activations_without_packed_layers_are_refused(float_model):
    with pytest.raises(InputError, match="int8 activations need packed linear layers; quantize the model first"):
        load_model(float_model, activations="int8")


# What it refuses, float and quantized alike.

FAMILIES = {
    "llama": {
        "matrix": "model.layers.0.mlp.up_proj.weight",
        "vector": "model.norm.weight",
        "width": "intermediate_size",
        "misfit": "model.layers.0.mlp.gate_proj.weight is [96, 64] instead of [128, 64] (and 5 more)",
        "layers": "num_hidden_layers",
        "missing": "model.layers.2.self_attn.q_proj.weight is missing (and 8 more)",
        "heads": "num_attention_heads",
        "activation": "hidden_act",
    },
    "gpt2": {
        "matrix": "transformer.h.0.mlp.c_fc.weight",
        "vector": "transformer.ln_f.weight",
        "width": "n_inner",
        "misfit": "transformer.h.0.mlp.c_fc.weight is [256, 64] instead of [128, 64] (and 5 more)",
        "layers": "n_layer",
        "missing": "transformer.h.2.ln_1.weight is missing (and 11 more)",
        "heads": "n_head",
        "activation": "activation_function",
    },
}


@pytest.fixture(params=["float", "quantized"])
def model(request: pytest.FixtureRequest, float_model: Path, packed: Path) -> Path:
    return float_model if request.param == "float" else packed


@pytest.fixture
def words(model: Path) -> dict:
    """What the tests need to know of the model's family."""
    return FAMILIES[json.loads((model / "config.json").read_text())["model_type"]]


@pytest.mark.parametrize("kind", ["matrix", "vector"])
def test_a_missing_tensor_is_named(model, words, kind, tmp_path):
    folder = altered(model, tmp_path / "model", lambda tensors: tensors.pop(words[kind]))
    assert refusal(folder) == f"{folder}: the files are not those of its config.json: {words[kind]} is missing"


def test_a_missing_layer_is_named_by_its_first_tensor(model, words, tmp_path):
    folder = altered(model, tmp_path / "model", **{words["layers"]: 3})
    assert refusal(folder) == f"{folder}: the files are not those of its config.json: {words['missing']}"


def test_shapes_that_disagree_with_the_config_are_named(model, words, tmp_path):
    folder = altered(model, tmp_path / "model", **{words["width"]: 128})
    assert refusal(folder) == f"{folder}: the files are not those of its config.json: {words['misfit']}"


def test_a_vector_of_another_length_is_named(model, words, tmp_path):
    def shorten(tensors: dict[str, torch.Tensor]) -> None:
        tensors[words["vector"]] = tensors[words["vector"]][:50].clone()

    folder = altered(model, tmp_path / "model", shorten)
    expected = f"{folder}: the files are not those of its config.json: {words['vector']} is [50] instead of [64]"
    assert refusal(folder) == expected


def test_another_vocabulary_size_is_named(model, tmp_path):
    folder = altered(model, tmp_path / "model", vocab_size=600)
    assert "is [512, 64] instead of [600, 64]" in refusal(folder)


def test_an_unknown_family_is_answered_with_those_there_are(model, tmp_path):
    folder = altered(model, tmp_path / "model", model_type="mamba")
    expected = (
        f"{folder / 'config.json'}: model_type 'mamba' is not supported; supported: {', '.join(families.FAMILIES)}"
    )
    assert refusal(folder) == expected


@pytest.mark.parametrize(("field", "value"), [("heads", 5), ("width", "wide"), ("activation", "no_such_function")])
def test_a_config_that_describes_no_model_is_refused(model, words, field, value, tmp_path):
    folder = altered(model, tmp_path / "model", **{words[field]: value})
    assert refusal(folder).startswith(f"{folder / 'config.json'}: describes no model: ")


def test_a_file_that_was_cut_short_is_refused(model, tmp_path):
    folder = altered(model, tmp_path / "model")
    file = folder / "model.safetensors"
    with file.open("r+b") as handle:
        handle.truncate(file.stat().st_size - 100)
    assert refusal(folder).startswith(f"{file}: ")


def test_an_unpacked_tensor_where_the_rules_say_packed_is_refused(packed, float_model, tmp_path):
    name = FAMILIES[json.loads((packed / "config.json").read_text())["model_type"]]["matrix"]
    original = load_file(float_model / "model.safetensors")[name]
    folder = altered(packed, tmp_path / "model", lambda tensors: tensors.update({name: original}))
    expected = f"{folder}: the files are not those of its config.json: {name} is not packed as the rules say"
    assert refusal(folder) == expected


def test_a_folder_that_another_method_quantized_is_refused(llama_model, tmp_path):
    folder = altered(llama_model, tmp_path / "model", quantization_config={"quant_method": "gptq", "bits": 4})
    message = f"{folder / 'config.json'}: quantized by 'gptq', which quantlab does not read; use the original model"
    assert refusal(folder) == message


def test_what_is_not_there_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    assert refusal(tmp_path / "nowhere") == f"{tmp_path / 'nowhere'}: no such folder or file"
    assert refusal(tmp_path / "empty") == f"{tmp_path / 'empty'}: holds no config.json; is this a model folder?"


def test_a_hub_id_that_is_not_at_hand_is_refused_offline(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert refusal("nobody/no-such-model").startswith("nobody/no-such-model: no such folder here, and the hub did not")
