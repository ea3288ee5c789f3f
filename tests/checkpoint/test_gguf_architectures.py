"""What goes into a GGUF file: the keys of llama.cpp's own converter, transformers' defaults, and no other model."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from gguf_cases import CASES, FULL, GEMMA, GPT2, LLAMA3, NEOX, PHI3, SIZES, SLIDING, YARN, longrope
from gguf_public import PUBLIC
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from quantlab.checkpoint.families import FAMILIES
from quantlab.checkpoint.gguf_architectures import ROWS
from quantlab.checkpoint.gguf_config import CONFIG_KEY, metadata_of
from quantlab.errors import InputError


def typed(metadata: dict[str, Any]) -> dict[str, tuple[type, Any]]:
    """With the types, which become GGUF's: 1 and 1.0 and True are equal in Python."""
    return {key: (type(value), value) for key, value in metadata.items()}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_models_get_the_keys_of_llama_cpps_converter(name):
    config, theirs, also = PUBLIC[name]
    made = metadata_of(config, config["vocab_size"], "config.json").metadata
    stored = made.pop(CONFIG_KEY)
    assert json.loads(stored) == config
    assert stored == json.dumps(config, sort_keys=True, separators=(",", ":"))
    architecture = made.pop("general.architecture")
    assert architecture == FAMILIES[config["model_type"]].gguf.architecture
    assert typed(made) == typed({f"{architecture}.{key}": value for key, value in (theirs | also).items()})


@pytest.mark.parametrize("case", CASES)
def test_the_new_spelling_says_the_same(case):
    """transformers rewrites a config.json when it saves a model."""
    values = copy.deepcopy(CASES[case])
    saved = AutoConfig.for_model(values.pop("model_type"), **values).to_dict()
    old, new = (metadata_of(config, 96, "config.json") for config in (CASES[case], saved))
    assert {**old.metadata, CONFIG_KEY: ""} == {**new.metadata, CONFIG_KEY: ""}
    assert old.notes == new.notes
    assert {name: tensor.tolist() for name, tensor in old.tensors.items()} == {
        name: tensor.tolist() for name, tensor in new.tensors.items()
    }


def test_every_type_has_a_row():
    assert {name: row.architecture for name, row in ROWS.items()} == {
        name: family.gguf.architecture for name, family in FAMILIES.items()
    }


@pytest.mark.parametrize("model_type", ROWS)
def test_defaults_are_those_of_transformers(model_type):
    row, configuration = ROWS[model_type], AutoConfig.for_model(model_type)
    unlisted = {"head_dim", "sliding_window_pattern"}  # no fields of every class; the metadata below tells
    for key, value in row.defaults.items():
        assert getattr(type(configuration), key, value if key in unlisted else "no such field") == value, key
    assert row.model_class == MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    assert row.aliases == configuration.attribute_map
    bare, full = ({"model_type": model_type}, configuration.to_dict())
    # Their phi3 and gemma defaults are public models, which llama.cpp computes.
    made = [metadata_of(config, 96, "config.json").metadata | {CONFIG_KEY: ""} for config in (bare, full)]
    assert made[0] == made[1]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "gpt2", **GPT2, "activation_function": "relu"}, "activation_function is 'relu' instead of one of"),
    ({"model_type": "gpt2", **GPT2, "activation_function": "quick_gelu"}, "activation_function is 'quick_gelu'"),
    ({"model_type": "gpt2", **GPT2, "scale_attn_weights": False}, "scale_attn_weights is False instead of true"),
    (
        {"model_type": "gpt2", **GPT2, "scale_attn_by_inverse_layer_idx": True},
        "scale_attn_by_inverse_layer_idx is True",
    ),
    ({"model_type": "gpt2", **GPT2, "add_cross_attention": True}, "add_cross_attention is True instead of false"),
    ({"model_type": "gpt2", **GPT2, "n_embd": 30}, "n_head is 4 instead of a divisor of the hidden size, 30"),
    ({"model_type": "gpt_neox", **NEOX, "hidden_act": "relu"}, "hidden_act is 'relu' instead of one of gelu"),
    ({"model_type": "gpt_neox", **NEOX, "attention_bias": False}, "attention_bias is False instead of true"),
    ({"model_type": "gpt_neox", **NEOX, "rotary_pct": 0.3125}, "partial_rotary_factor is 0.3125 instead of"),
    (
        {"model_type": "gpt_neox", **NEOX, "rope_scaling": LLAMA3},
        "rope_scaling.rope_type is 'llama3' instead of one of",
    ),
    ({"model_type": "llama", **SIZES, "hidden_act": "gelu"}, "hidden_act is 'gelu' instead of one of silu, swish"),
    ({"model_type": "llama", **SIZES, "num_key_value_heads": 3}, "num_key_value_heads is 3 instead of a divisor"),
    (
        {"model_type": "llama", **SIZES, "head_dim": 7},
        "num_attention_heads is 4 instead of a number of heads of an even",
    ),
    ({"model_type": "llama", **SIZES, "num_hidden_layers": 513}, "num_hidden_layers is 513 instead of"),
    ({"model_type": "llama", **SIZES, "partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5 instead of"),
    (
        {"model_type": "llama", **SIZES, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        "rope_scaling.rope_type is 'dynamic' instead of one of default, linear, yarn, llama3, longrope; llama.cpp does",
    ),
    (
        {"model_type": "llama", **SIZES, "rope_parameters": {FULL: {"rope_type": "default"}}},
        "rope_parameters differs by layer type",
    ),
    ({"model_type": "llama", **SIZES, "rope_scaling": YARN | {"beta_fast": 16}}, "beta_fast is 16 instead of 32"),
    ({"model_type": "llama", **SIZES, "rope_scaling": YARN | {"truncate": False}}, "truncate is False instead of true"),
    ({"model_type": "llama", **SIZES, "rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing; mend"),
    ({"model_type": "llama", **SIZES, "rope_scaling": LLAMA3 | {"high_freq_factor": 1}}, "low_freq_factor is 1.0"),
    (
        {"model_type": "llama", **SIZES, "rope_scaling": longrope(5, type="longrope")},
        "is no list of 4 positive numbers",
    ),
    ({"model_type": "qwen2", **SIZES, "head_dim": 16}, "head_dim is 16 instead of 8; llama.cpp's qwen2 has no other"),
    ({"model_type": "qwen2", **SIZES, "rope_scaling": longrope(4, type="longrope")}, "rope_type is 'longrope'"),
    ({"model_type": "qwen2", **SIZES, "layer_types": [SLIDING, FULL]}, "layer_types has sliding_attention, and"),
    ({"model_type": "qwen3", **SIZES, "attention_bias": True}, "attention_bias is True instead of false"),
    ({"model_type": "phi3", **PHI3, "head_dim": 16}, "head_dim is 16 instead of 8"),
    ({"model_type": "phi3", **PHI3, "rope_scaling": {"type": "linear", "factor": 2}}, "rope_type is 'linear'"),
    ({"model_type": "gemma2", **GEMMA, "query_pre_attn_scalar": 256}, "query_pre_attn_scalar is 256 instead of 16"),
    ({"model_type": "gemma2", **GEMMA, "num_hidden_layers": 46}, "query_pre_attn_scalar is 16 instead of 8"),
    ({"model_type": "gemma2", **GEMMA, "attn_logit_softcapping": None}, "attn_logit_softcapping is None instead of"),
    ({"model_type": "gemma2", **GEMMA, "attention_bias": True}, "attention_bias is True instead of false"),
    ({"model_type": "gemma2", **GEMMA, "use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
    ({"model_type": "gemma2", **GEMMA, "hidden_activation": "silu"}, "hidden_activation is 'silu' instead of one of"),
    ({"model_type": "gemma2", **GEMMA, "layer_types": [FULL, FULL]}, "layer_types has no sliding_attention"),
    ({"model_type": "gemma2", **GEMMA, "layer_types": [FULL]}, "layer_types is no list of 2 times"),
    ({"model_type": "gemma2", **GEMMA, "layer_types": [FULL, "chunked"]}, "layer_types is no list of 2 times"),
    ({"model_type": "gemma2", **GEMMA, "sliding_window": None}, "sliding_window is None instead of a number of tokens"),
    ({"model_type": "gemma3_text", **GEMMA, "final_logit_softcapping": 0.0}, "final_logit_softcapping is 0.0"),
    (
        {"model_type": "gemma3_text", **GEMMA, "rope_parameters": {SLIDING: {"rope_type": "linear", "factor": 2.0}}},
        "rope_parameters.sliding_attention.rope_type is 'linear' instead of one of default",
    ),
    (
        {"model_type": "gemma3_text", **GEMMA, "rope_scaling": YARN | {"attention_factor": 1.5}},
        "rope_parameters.full_attention has an attention factor of its own",
    ),
    ({"model_type": "llama", **SIZES, "hidden_size": "32"}, "hidden_size is '32' instead of a whole number"),
    ({"model_type": "llama", **SIZES, "hidden_size": None}, "hidden_size is None instead of a whole number"),
    ({"model_type": "llama", **SIZES, "rope_theta": 1e39}, "rope_theta is 1e+39 instead of a positive number"),
    ({"model_type": "llama", **SIZES, "rope_scaling": [1]}, "rope_scaling is [1] instead of an object"),
    ({"model_type": "llama", **SIZES, "x": float("nan")}, "holds something that JSON has not"),
    ({"model_type": "mixtral", **SIZES}, "model_type 'mixtral' is not supported"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED, ids=[message[:45] for _, message in REFUSED])
def test_what_llama_cpp_would_compute_differently_is_refused(config, message):
    with pytest.raises(InputError) as caught:
        metadata_of(config, 96, "folder/config.json")
    assert str(caught.value).startswith("folder/config.json: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_gelu_may_be_exact_or_not():
    for name in ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"):
        assert metadata_of({"model_type": "gpt_neox", **NEOX, "hidden_act": name}, 96, "f").notes == ()


def test_the_27b_gemmas_scale_queries_by_the_hidden_size():
    for model_type, blocks in (("gemma2", 46), ("gemma3_text", 62)):
        config = {"model_type": model_type, **GEMMA, "num_hidden_layers": blocks, "query_pre_attn_scalar": 8}
        assert metadata_of(config, 96, "f").metadata[f"{ROWS[model_type].architecture}.block_count"] == blocks


def test_layer_types_beyond_the_usual_pattern_are_stated():
    usual = metadata_of(CASES["gemma2"] | {"layer_types": [SLIDING, FULL]}, 96, "f").metadata
    assert "gemma2.attention.sliding_window_pattern" not in usual
    other = metadata_of(CASES["gemma2-layers"], 96, "f").metadata
    assert other["gemma2.attention.sliding_window_pattern"] == [False, True, True]
    full = metadata_of(CASES["gemma3-full"], 96, "f").metadata
    assert "gemma3.attention.sliding_window" not in full
    assert "gemma3.rope.freq_base_swa" not in full


@pytest.mark.parametrize(
    ("case", "note"),
    [
        ("mistral", "sliding_window: llama.cpp ignores it here, so texts above 8 tokens differ there"),
        ("qwen2-sliding", "sliding_window: llama.cpp ignores it here, so texts above 8 tokens differ there"),
        ("phi3", "sliding_window: llama.cpp ignores it here, so texts above 8 tokens differ there"),
        (
            "phi3-longrope",
            "longrope: llama.cpp takes the long factors for any text once its context is above 16 tokens",
        ),
        ("mistral-full", None),
        ("gemma2", None),
        ("llama-llama3", None),
    ],
)
def test_notes_tell_what_differs_for_long_texts(case, note):
    notes = metadata_of(CASES[case], 96, "f").notes
    assert [entry.partition(";")[0] for entry in notes] == ([] if note is None else [note])


def test_a_window_as_long_as_the_context_needs_no_note():
    made = metadata_of(CASES["mistral"] | {"sliding_window": 64}, 96, "f")
    assert made.metadata["llama.attention.sliding_window"] == 64
    assert made.notes == ()
