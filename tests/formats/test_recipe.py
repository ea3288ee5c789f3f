"""Recipes: ordered rules from tensor names to formats, the same in memory and in config.json."""

from __future__ import annotations

import json

import pytest

from quantlab.errors import InputError
from quantlab.formats import FORMATS, Recipe

RECIPE = Recipe(
    (
        ("model.layers.0.*", None),
        ("model.layers.*.mlp.down_proj.weight", "q5_1"),
        ("model.layers.*.weight", "q4_1"),
        ("lm_head.weight", "Q8_0"),
    )
)


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("model.layers.3.mlp.up_proj.weight", "q4_1"),
        ("model.layers.3.mlp.down_proj.weight", "q5_1"),  # the first of two rules that match
        ("model.layers.0.mlp.down_proj.weight", None),  # None is a rule too, and stops the search
        ("lm_head.weight", "q8_0"),  # in any case
        ("model.embed_tokens.weight", None),  # no rule
        ("old.model.layers.3.mlp.up_proj.weight", None),  # patterns match whole names
        ("model.layers.3.mlp.up_proj.weight.extra", None),
        ("MODEL.LAYERS.3.MLP.UP_PROJ.WEIGHT", None),
    ],
)
def test_the_first_matching_rule_decides(name, format):
    expected = None if format is None else FORMATS[format]
    assert RECIPE.format_for(name, (64, 96)) is expected
    assert RECIPE.format_by_name(name) is expected


@pytest.mark.parametrize("shape", [(64, 72), (64,), (), (4, 64, 64), (0, 64), (64, 0)])
def test_a_shape_without_rows_of_whole_blocks_has_no_format_whatever_the_rules_say(shape):
    assert RECIPE.format_for("lm_head.weight", shape) is None
    assert RECIPE.format_by_name("lm_head.weight") is FORMATS["q8_0"]


def test_patterns_are_shell_globs():
    recipe = Recipe((("h.[01].?_proj.weight", "q4_0"),))
    assert recipe.format_by_name("h.1.q_proj.weight") is FORMATS["q4_0"]
    assert recipe.format_by_name("h.2.q_proj.weight") is None
    assert recipe.format_by_name("h.1.up_proj.weight") is None


def test_a_recipe_without_rules_leaves_everything_as_it_is():
    assert Recipe(()).format_for("lm_head.weight", (64, 64)) is None


def test_a_rule_with_an_unknown_format_is_refused_when_it_is_made():
    with pytest.raises(
        InputError, match="unknown format 'q3_k'; choose one of: q4_0, q4_1, q5_0, q5_1, q8_0, tq2_0, ternary"
    ):
        Recipe((("lm_head.weight", "q3_k"),))


def test_the_json_form_is_a_quantization_config():
    assert Recipe((("a.*", "q4_1"), ("b", None))).to_config() == {
        "quant_method": "quantlab",
        "rules_version": 1,
        "rules": [["a.*", "q4_1"], ["b", None]],
    }


def test_a_recipe_survives_json():
    assert Recipe.from_config(json.loads(json.dumps(RECIPE.to_config())), "config.json") == RECIPE


def test_further_fields_of_a_config_are_ignored():
    config = {**RECIPE.to_config(), "method": "rtn", "quantlab_version": "9.9"}
    assert Recipe.from_config(config, "config.json") == RECIPE


NO_RULES = "quantization_config.rules must be a list of [pattern, format] pairs"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, "quantized by 'gptq', which quantlab does not read; use the original model"),
        ({"quant_method": None}, "quantized by None, which quantlab does not read; use the original model"),
        ({"rules_version": 2}, "rules_version is 2, this quantlab reads 1; upgrade it"),
        ({"rules_version": None}, "rules_version is None, this quantlab reads 1; upgrade it"),
        ({"rules": None}, NO_RULES),
        ({"rules": {"a.*": "q4_1"}}, NO_RULES),
        ({"rules": "a.*"}, NO_RULES),
        ({"rules": ["a.*"]}, NO_RULES),
        ({"rules": [["a.*"]]}, NO_RULES),
        ({"rules": [["a.*", "q4_1", "q8_0"]]}, NO_RULES),
        ({"rules": [[None, "q4_1"]]}, NO_RULES),
        ({"rules": [["a.*", 4]]}, NO_RULES),
        ({"rules": [["a.*", "q4_1"], {"b": "q4_1"}]}, NO_RULES),
        (
            {"rules": [["a.*", "q4"]]},
            "unknown format 'q4'; choose one of: q4_0, q4_1, q5_0, q5_1, q8_0, tq2_0, ternary",
        ),
    ],
)
def test_a_malformed_config_is_refused_with_its_file_and_fault(change, message):
    with pytest.raises(InputError) as error:
        Recipe.from_config({**RECIPE.to_config(), **change}, "model/config.json")
    assert str(error.value) == f"model/config.json: {message}"


@pytest.mark.parametrize("field", ["quant_method", "rules_version", "rules"])
def test_a_config_without_a_field_is_refused(field):
    config = {key: value for key, value in RECIPE.to_config().items() if key != field}
    with pytest.raises(InputError, match=r"^model/config\.json: "):
        Recipe.from_config(config, "model/config.json")
