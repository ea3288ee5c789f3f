"""`import quantlab.hf` is all that transformers and peft need to load, run, adapt, save and unpack packed folders."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

import quantlab.hf
from quantlab import quantize_checkpoint
from quantlab.nn import QuantEmbedding, QuantLinear

TOKENS = torch.arange(2 * 24).reshape(2, 24) * 7 % 512
PROMPT = torch.tensor([[1, 45, 300, 77]])


@pytest.fixture(scope="module")
def packed(float_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The float model in q4_1, with q8_0 tables."""
    folder = tmp_path_factory.mktemp("packed") / "model"
    quantize_checkpoint(float_model, folder)
    return folder


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(TOKENS).logits


def packed_modules(model) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, (QuantLinear, QuantEmbedding))]


# Load and run.


def test_from_pretrained_gives_the_dequantized_model_to_the_last_bit(packed, float_twin):
    model = AutoModelForCausalLM.from_pretrained(packed)
    assert packed_modules(model)
    assert torch.equal(logits(model), logits(float_twin(packed)))


def test_weights_stay_packed_in_memory(packed):
    model = AutoModelForCausalLM.from_pretrained(packed)
    stored = load_file(packed / "model.safetensors")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, stored[name])
        assert parameter.dtype == stored[name].dtype


def test_a_tied_head_shares_the_embeddings_blocks(packed):
    model = AutoModelForCausalLM.from_pretrained(packed)
    shared = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert shared is model.config.tie_word_embeddings


@pytest.mark.parametrize("how", ["from_pretrained", "to"])
def test_activations_are_in_the_dtype_that_is_asked_for(packed, how, float_twin):
    if how == "to":  # which casts what transformers keeps in fp32 too, for the float model alike
        model = AutoModelForCausalLM.from_pretrained(packed).to(torch.bfloat16)
        twin = float_twin(packed).to(torch.bfloat16)
    else:
        model = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.bfloat16)
        twin = float_twin(packed, torch.bfloat16)
    assert logits(model).dtype == torch.bfloat16
    assert torch.equal(logits(model), logits(twin))


def test_generate_writes_what_the_dequantized_model_writes(packed, float_twin):
    settings = {"max_new_tokens": 32, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    generated = AutoModelForCausalLM.from_pretrained(packed).generate(PROMPT, **settings)
    assert generated.shape == (1, PROMPT.shape[1] + 32)
    assert torch.equal(generated, float_twin(packed).generate(PROMPT, **settings))


def test_the_bare_model_loads_by_the_same_folder(packed, float_twin):
    bare = AutoModel.from_pretrained(packed)
    twin = float_twin(packed).base_model
    matrices = [name for name, module in twin.named_modules() if isinstance(module, (torch.nn.Linear, Conv1D))]
    assert len(packed_modules(bare)) == len(matrices) + 1  # the embedding
    with torch.no_grad():
        assert torch.equal(bare(TOKENS).last_hidden_state, twin(TOKENS).last_hidden_state)


def test_another_head_may_be_put_on_the_packed_model(packed, float_twin):
    """A classifier starts from random head weights, which stay float; the model under it is the quantized one."""
    classifier = AutoModelForSequenceClassification.from_pretrained(packed, num_labels=3)
    assert classifier.score.weight.dtype == torch.float32
    with torch.no_grad():
        hidden = classifier.base_model(TOKENS).last_hidden_state
        assert torch.equal(hidden, float_twin(packed).base_model(TOKENS).last_hidden_state)


FRESH_PROCESS = """
import sys, torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
except (ValueError, RuntimeError):
    print("refused")
import quantlab.hf
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(model(torch.tensor([[1, 45, 300, 77]])).logits.double().sum().item())
"""


def test_a_fresh_process_needs_the_import_and_nothing_else(llama_model, tmp_path):
    """Without it, transformers does not know the quantization method and finds bytes where it wants floats."""
    quantize_checkpoint(llama_model, tmp_path / "packed")
    command = [sys.executable, "-c", FRESH_PROCESS, str(tmp_path / "packed")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")(PROMPT).logits.double().sum().item()
    assert result.stdout.split() == ["refused", str(expected)]


def test_importing_again_registers_once():
    assert importlib.reload(quantlab.hf) is quantlab.hf


# Save.


def test_save_pretrained_writes_the_same_tensors_and_quantization_config(packed, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(packed)
    model.save_pretrained(tmp_path)
    stored, written = load_file(packed / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert set(written) == set(stored)
    for name, tensor in stored.items():
        assert written[name].dtype == tensor.dtype
        assert torch.equal(written[name], tensor)
    source, copy = (json.loads((folder / "config.json").read_text()) for folder in (packed, tmp_path))
    assert copy["quantization_config"] == source["quantization_config"]
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_saved_shards_load_as_one(packed, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(packed)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


# Unpack.


def test_dequantize_gives_the_float_model_of_the_same_logits(packed, float_twin):
    model = AutoModelForCausalLM.from_pretrained(packed)
    before = logits(model)
    model = model.dequantize()
    twin = float_twin(packed)
    assert packed_modules(model) == []
    assert [type(module) for module in model.modules()] == [type(module) for module in twin.modules()]
    assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), logits(twin))
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied is model.config.tie_word_embeddings


def test_a_dequantized_model_saves_as_a_plain_float_model(packed, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(packed).dequantize()
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.float32}
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


# Adapt.


def with_adapters(model):
    """peft's usual setting, its random half drawn from one seed."""
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))


def adapter_gradients(model) -> dict[str, torch.Tensor]:
    model(TOKENS, labels=TOKENS).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_peft_finds_every_linear_layer_that_it_finds_in_the_float_model(packed, float_twin):
    adapted, expected = with_adapters(AutoModelForCausalLM.from_pretrained(packed)), with_adapters(float_twin(packed))
    names = {name: parameter.shape for name, parameter in adapted.named_parameters() if "lora" in name}
    assert names == {name: parameter.shape for name, parameter in expected.named_parameters() if "lora" in name}
    assert len(names) == 2 * 2 * {"llama": 7, "gpt2": 4}[adapted.config.model_type]  # two matrices, two layers


def test_a_fresh_adapter_changes_nothing(packed):
    model = AutoModelForCausalLM.from_pretrained(packed)
    before = logits(model)
    assert torch.equal(logits(with_adapters(model)), before)


def test_adapter_gradients_are_those_of_the_dequantized_model(packed, float_twin):
    found = adapter_gradients(with_adapters(AutoModelForCausalLM.from_pretrained(packed)))
    expected = adapter_gradients(with_adapters(float_twin(packed)))
    assert set(found) == set(expected)
    assert all("lora" in name for name in found)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


def test_gradient_checkpointing_computes_the_same_gradients(packed):
    expected = adapter_gradients(with_adapters(AutoModelForCausalLM.from_pretrained(packed)))
    model = with_adapters(AutoModelForCausalLM.from_pretrained(packed)).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    model.config.attention_dropout = 0.0
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for name, gradient in adapter_gradients(model).items():
        torch.testing.assert_close(gradient, expected[name])


def test_one_step_changes_only_the_adapter_and_lowers_the_loss(packed):
    model = with_adapters(AutoModelForCausalLM.from_pretrained(packed))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.05)
    loss = model(TOKENS, labels=TOKENS).loss
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        assert model(TOKENS, labels=TOKENS).loss < loss
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name in before if "lora_B" in name}  # lora_A's gradient is zero at the start
