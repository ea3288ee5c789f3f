"""The default recipe of a format: linear weights in it, embedding and head in q8_0 or alike, the rest as it is."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from quantlab.checkpoint.families import FAMILIES
from quantlab.formats import FORMATS
from quantlab.quantization.recipes import default_recipe

SHAPES = {
    "llama": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 12, "num_attention_heads": 4},
    "gpt2": {"n_embd": 64, "n_layer": 12, "n_head": 4},
}

every_family = pytest.mark.parametrize("family", SHAPES)


def new_model(family: str, **settings) -> nn.Module:
    config = AutoConfig.for_model(family, vocab_size=128, tie_word_embeddings=False, **SHAPES[family], **settings)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def formats_of(model: nn.Module, recipe) -> dict[str, str | None]:
    """What the recipe gives each of a real model's tensors."""
    found = {}
    for name, parameter in model.named_parameters():
        format = recipe.format_for(name, tuple(parameter.shape))
        found[name] = None if format is None else format.name
    return found


@every_family
@pytest.mark.parametrize(
    ("format", "uniform", "vocabulary"),
    [
        ("q4_0", False, "q8_0"),
        ("q4_1", False, "q8_0"),
        ("q5_0", False, "q8_0"),
        ("q5_1", False, "q8_0"),
        ("q8_0", False, "q8_0"),
        ("q4_0", True, "q4_0"),
        ("q4_1", True, "q4_1"),
        ("q8_0", True, "q8_0"),
    ],
)
def test_every_tensor_of_a_model_has_its_format(family, format, uniform, vocabulary):
    model = new_model(family)
    recipe = default_recipe(FAMILIES[family], FORMATS[format], uniform)
    tables = {model.get_input_embeddings(), model.get_output_embeddings()}
    expected = {}
    for module_name, module in model.named_modules():
        for name, _ in module.named_parameters(prefix=module_name, recurse=False):
            is_matrix = name.endswith(".weight") and isinstance(module, (nn.Linear, Conv1D))
            expected[name] = format if is_matrix else None
            if module in tables:
                expected[name] = vocabulary
    assert formats_of(model, recipe) == expected


def test_biases_of_linear_layers_stay():
    model = new_model("llama", attention_bias=True, mlp_bias=True)
    formats = formats_of(model, default_recipe(FAMILIES["llama"], FORMATS["q4_1"]))
    biases = {format for name, format in formats.items() if name.endswith(".bias")}
    assert biases == {None}


def test_position_tables_stay():
    formats = formats_of(new_model("gpt2"), default_recipe(FAMILIES["gpt2"], FORMATS["q4_1"], uniform=True))
    assert formats["transformer.wpe.weight"] is None
    assert formats["transformer.wte.weight"] == "q4_1"


@every_family
def test_uniform_is_off_by_default(family):
    row = FAMILIES[family]
    assert default_recipe(row, FORMATS["q4_1"]) == default_recipe(row, FORMATS["q4_1"], uniform=False)
