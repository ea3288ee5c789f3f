"""The default recipe of a format: linear weights in it, embedding and head in q8_0 or alike, the rest as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from quantlab.checkpoint.families import FAMILIES
from quantlab.errors import InputError
from quantlab.formats import FORMATS
from quantlab.quantization.recipes import default_recipe, named_recipe

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


# Recipes by name and from files.


def recipe_file(folder: Path, content: object) -> str:
    path = folder / "recipe.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", FORMATS)
def test_presets_of_a_formats_name_are_its_default_recipes(name):
    row = FAMILIES["llama"]
    assert named_recipe(name, row, ()) == default_recipe(row, FORMATS[name])


def test_ternary_is_a_preset_by_its_alias_and_leaves_narrow_rows():
    recipe = named_recipe("ternary", FAMILIES["llama"], ())
    assert recipe == named_recipe("tq2_0", FAMILIES["llama"], ())
    up = "model.layers.1.mlp.up_proj.weight"
    assert recipe.format_for(up, (96, 512)) is FORMATS["tq2_0"]
    assert recipe.format_for(up, (96, 128)) is None
    assert recipe.format_for("lm_head.weight", (96, 512)) is FORMATS["q8_0"]
    uniform = default_recipe(FAMILIES["llama"], FORMATS["tq2_0"], uniform=True)
    assert uniform.format_for("lm_head.weight", (96, 512)) is FORMATS["tq2_0"]


@pytest.mark.parametrize(
    ("family", "finer"),
    [
        ("llama", {"self_attn.v_proj", "mlp.down_proj"}),
        ("gpt2", {"attn.c_attn", "mlp.c_proj"}),
        ("gpt_neox", {"attention.query_key_value", "mlp.dense_4h_to_h"}),
        ("phi3", {"self_attn.qkv_proj", "self_attn.v_proj", "mlp.down_proj"}),  # one joint matrix, in its files
        ("gemma3_text", {"self_attn.v_proj", "mlp.down_proj"}),
    ],
)
def test_the_mixed_preset_gives_more_bits_where_they_count(family, finer):
    """Attention values (or the matrix that holds them), down projections, embedding and head; q4_1 elsewhere."""
    row = FAMILIES[family]
    recipe = named_recipe("q4_1-mixed", row, ())
    assert recipe.format_by_name(row.embedding).name == recipe.format_by_name(row.head).name == "q8_0"
    kinds = {ours.split(".{}.")[1] for ours, theirs in row.gguf.stems if ".{}." in ours and "norm" not in ours}
    prefix = row.linear[0].partition("*")[0]
    for kind in kinds - {"ln_1", "ln_2"}:
        format = recipe.format_by_name(f"{prefix}3.{kind}.weight")
        assert format.name == ("q5_1" if kind in finer else "q4_1")
        assert recipe.format_by_name(f"{prefix}3.{kind}.bias") is None


def test_a_file_has_rules_over_a_base(tmp_path):
    rules = [["model.layers.0.*", "Q8_0"], ["*.mlp.up_proj.weight", None], ["*.k_proj.weight", "float"]]
    file = recipe_file(tmp_path, {"rules": rules, "base": "q4_0"})
    model = new_model("llama")
    recipe = named_recipe(file, FAMILIES["llama"], [name for name, _ in model.named_parameters()])
    formats = formats_of(model, recipe)
    assert formats["model.layers.0.mlp.up_proj.weight"] == "q8_0"
    assert formats["model.layers.1.mlp.up_proj.weight"] is None
    assert formats["model.layers.1.self_attn.k_proj.weight"] is None
    assert formats["model.layers.1.self_attn.q_proj.weight"] == "q4_0"
    assert formats["lm_head.weight"] == "q8_0"
    assert formats["model.layers.0.input_layernorm.weight"] is None  # a vector has no blocks


def test_without_a_base_what_no_rule_names_stays(tmp_path):
    model = new_model("gpt2")
    file = recipe_file(tmp_path, "rules:\n- [transformer.h.2.mlp.c_fc.weight, q5_0]\n")
    recipe = named_recipe(file, FAMILIES["gpt2"], [name for name, _ in model.named_parameters()])
    packed = {name: format for name, format in formats_of(model, recipe).items() if format}
    assert packed == {"transformer.h.2.mlp.c_fc.weight": "q5_0"}


NAMES = ("lm_head.weight",)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("rules: [", "not a YAML file: "),
        ("[1, 2]", "is no mapping; a recipe has rules: a list of [pattern, format], and maybe base: a preset"),
        ({"rules": [["*", "q4_1"]], "bass": "q4_1"}, "knows no 'bass'; a recipe has rules: "),
        ({}, "rules must be a list of [pattern, format]"),
        ({"rules": []}, "rules must be a list of [pattern, format]"),
        ({"rules": [["*", "q4_1"], ["*"]]}, "rule 2 is no [pattern, format]"),
        ({"rules": [["*", 4]]}, "rule 1 is no [pattern, format]"),
        ({"rules": [["*", "q3_k"]]}, "unknown format 'q3_k'; choose one of: "),
        (
            {"rules": [["*", "q4_1"]], "base": "q9"},
            "base 'q9': choose one of: q4_0, q4_1, ",
        ),
        ({"rules": [["model.*", "q4_1"]]}, "pattern 'model.*' matches no tensor of this model (see: quantlab inspect)"),
    ],
)
def test_broken_files_are_refused_in_one_line(content, problem, tmp_path):
    file = recipe_file(tmp_path, content)
    with pytest.raises(InputError) as error:
        named_recipe(file, FAMILIES["llama"], NAMES)
    assert str(error.value).startswith(f"{file}: {problem}")
    assert "\n" not in str(error.value)


def test_neither_a_preset_nor_a_file():
    with pytest.raises(InputError) as error:
        named_recipe("q4_2", FAMILIES["llama"], NAMES)
    expected = "recipe 'q4_2': neither a file nor one of: q4_0, q4_1, q5_0, q5_1, q8_0, tq2_0, ternary, q4_1-mixed"
    assert str(error.value) == expected
