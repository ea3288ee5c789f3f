"""GGUF files that others made, edited, or forged: a config that transformers takes, or an error of one line."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from gguf_cases import CASES, FULL, SLIDING, no_tensor, plain_file, transformers_config
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlab.checkpoint.gguf_config import config_of
from quantlab.errors import InputError


def found_in(model_type: str, **more: Any) -> dict[str, Any]:
    metadata, shapes = plain_file(model_type)
    architecture = metadata["general.architecture"]
    more = {f"{architecture}.{key.replace('__', '.')}": value for key, value in more.items()}
    return config_of(metadata | more, shapes, no_tensor, "f")


def test_missing_keys_take_what_llama_cpp_takes():
    metadata, shapes = plain_file("llama")
    for key in ("attention.head_count_kv", "attention.key_length", "attention.value_length", "vocab_size"):
        del metadata[f"llama.{key}"]
    for key in ("rope.freq_base", "rope.dimension_count"):
        del metadata[f"llama.{key}"]
    shapes["blk.0.attn_k.weight"] = (32, 32)
    found = config_of(metadata, shapes, no_tensor, "f")
    assert found["num_key_value_heads"] == 4
    assert found["head_dim"] == 8
    assert found["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    assert found["bos_token_id"] is found["eos_token_id"] is found["pad_token_id"] is None
    metadata, shapes = plain_file("gemma2")
    for key in ("attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping"):
        del metadata[f"gemma2.{key}"]
    found = config_of(metadata, shapes, no_tensor, "f")
    assert found["sliding_window"] == 4096
    assert (found["attn_logit_softcapping"], found["final_logit_softcapping"]) == (50.0, 30.0)
    metadata, shapes = plain_file("gemma3_text")
    for key in ("attention.sliding_window", "rope.freq_base_swa"):
        del metadata[f"gemma3.{key}"]
    assert set(config_of(metadata, shapes, no_tensor, "f")["layer_types"]) == {FULL}


def test_a_sliding_window_makes_a_llama_a_mistral():
    assert found_in("llama", attention__sliding_window=8)["model_type"] == "mistral"
    assert found_in("llama", attention__sliding_window=0)["model_type"] == "llama"


def test_the_pattern_of_sliding_layers_may_be_a_number():
    assert found_in("gemma2", attention__sliding_window_pattern=1)["layer_types"] == [FULL, FULL]
    assert found_in("gemma2", attention__sliding_window_pattern=0)["layer_types"] == [SLIDING, SLIDING]
    assert found_in("gemma2", attention__sliding_window_pattern=np.array([0, 1]))["layer_types"] == [FULL, SLIDING]


def test_special_tokens_and_dtype():
    metadata, shapes = plain_file("llama")
    tokens = {f"tokenizer.ggml.{name}_token_id": n for name, n in (("bos", 3), ("eos", 95), ("padding", 96))}
    found = config_of(metadata | tokens | {"general.file_type": 32}, shapes, no_tensor, "f")
    assert [found[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [3, 95, None]  # 96: outside
    assert found["dtype"] == "bfloat16"
    assert config_of(metadata | {"general.file_type": 3}, shapes, no_tensor, "f")["dtype"] == "float32"
    assert config_of(metadata | {"general.file_type": "?"}, shapes, no_tensor, "f")["dtype"] == "float32"


HOSTILE: list[tuple[str, str, Any, str]] = [
    ("llama", "block_count", 3, "block_count is 3 instead of 2, the number of layers"),
    ("llama", "block_count", 2**31 - 1, "block_count is 2147483647 instead of a whole number from 1 to 512"),
    ("llama", "block_count", -2, "block_count is -2 instead of"),
    ("llama", "block_count", 2.0, "block_count is 2.0 instead of"),
    ("llama", "block_count", True, "block_count is True instead of"),
    ("llama", "block_count", "2", "block_count is '2' instead of"),
    ("llama", "block_count", None, "block_count is missing"),
    ("llama", "context_length", 0, "context_length is 0 instead of"),
    ("llama", "context_length", 2**32, "context_length is 4294967296 instead of"),
    ("llama", "embedding_length", 64, "tensor token_embd.weight is [96, 32] instead of [96, 64]"),
    ("llama", "feed_forward_length", 2**30, "tensor blk.0.ffn_down.weight is [32, 48] instead of"),
    ("llama", "feed_forward_length", np.array([48, 48]), "feed_forward_length is array([48, 48]) instead of"),
    ("llama", "attention.head_count", 3, "attention.head_count is 3 instead of a divisor of the hidden size"),
    ("llama", "attention.head_count", 64, "attention.head_count is 64 instead of a divisor"),
    ("llama", "attention.head_count_kv", 3, "attention.head_count_kv is 3 instead of a divisor of 4 heads"),
    ("llama", "attention.head_count_kv", 1, "tensor blk.0.attn_k.weight is [16, 32] instead of [8, 32]"),
    ("llama", "attention.key_length", 7, "attention.value_length is 8 instead of 7"),
    ("llama", "attention.key_length_swa", 7, "attention.key_length_swa is 7 instead of 8"),
    ("llama", "attention.layer_norm_rms_epsilon", float("nan"), "layer_norm_rms_epsilon is nan instead of"),
    ("llama", "attention.layer_norm_rms_epsilon", -1e-5, "layer_norm_rms_epsilon is -1e-05 instead of"),
    ("llama", "attention.sliding_window", -1, "attention.sliding_window is -1 instead of"),
    ("llama", "attention.causal", False, "attention.causal is False instead of true"),
    ("llama", "expert_count", 8, "expert_count is 8 instead of 0; quantlab reads no such models"),
    ("llama", "expert_count", np.zeros(2), "expert_count is array([0., 0.]) instead of 0"),
    ("llama", "rope.freq_base", float("inf"), "rope.freq_base is inf instead of"),
    ("llama", "rope.freq_base", 0, "rope.freq_base is 0 instead of"),
    ("llama", "rope.dimension_count", 4, "rope.dimension_count is 4 instead of"),
    ("llama", "rope.scaling.type", "dynamic", "rope.scaling.type is 'dynamic' instead of none, linear, yarn"),
    ("llama", "rope.scaling.type", 3, "rope.scaling.type is 3 instead of text"),
    ("llama", "rope.scaling.type", "longrope", "does not go with rope_factors_long.weight"),
    ("llama", "rope.scaling.factor", -2.0, "rope.scaling.factor is -2.0 instead of"),
    ("llama", "rope.scaling.factor", np.array([1.0, 2.0]), "rope.scaling.factor is array([1., 2.]) instead of"),
    ("llama", "rope.scaling.attn_factor", 2.0, "rope.scaling.attn_factor is 2.0 instead of 1"),
    ("phi3", "rope.scaling.factor", 2.0, "rope.scaling.type asks for linear; this architecture has default, longrope"),
    ("phi3", "rope.dimension_count", 9, "rope.dimension_count is 9 instead of"),
    ("phi3", "rope.dimension_count", 2**31 - 2, "rope.dimension_count is 2147483646 instead of"),
    ("phi3", "attention.key_length", 16, "attention.key_length is 16 instead of 8; llama.cpp's phi3 has no other"),
    ("qwen2", "attention.sliding_window_pattern", [True], "one true or false for each of 2 layers"),
    ("gemma2", "attention.sliding_window_pattern", np.ones(10**6, bool), "one true or false for each of 2 layers"),
    ("gemma2", "attention.sliding_window_pattern", -1, "one true or false for each of 2 layers"),
    ("gemma2", "attention.sliding_window_pattern", [1.5, 0], "one true or false for each of 2 layers"),
    ("gemma2", "attn_logit_softcapping", 0.0, "attn_logit_softcapping is 0.0 instead of"),
    ("gemma2", "rope.freq_base_swa", 5.0, "rope.freq_base_swa is 5.0 instead of 5000"),
    ("gemma3_text", "rope.freq_base_swa", "x", "rope.freq_base_swa is 'x' instead of"),
    ("gpt_neox", "use_parallel_residual", 1, "use_parallel_residual is 1 instead of true or false"),
    ("gpt_neox", "use_parallel_residual", None, "use_parallel_residual is missing"),
    ("gpt_neox", "attention.head_count_kv", 2, "attention.head_count_kv is 2 instead of"),
    ("gpt2", "context_length", 65, "tensor position_embd.weight is [64, 32] instead of [65, 32]"),
    ("gpt2", "attention.layer_norm_epsilon", None, "attention.layer_norm_epsilon is missing"),
]


@pytest.mark.parametrize(("model_type", "key", "value", "message"), HOSTILE, ids=lambda value: str(value)[:30])
def test_metadata_that_cannot_be_true_is_an_error_of_one_line(model_type, key, value, message):
    metadata, shapes = plain_file(model_type)
    key = f"{metadata['general.architecture']}.{key}"
    metadata |= {key: value}
    if value is None:
        del metadata[key]
    with pytest.raises(InputError) as caught:
        config_of(metadata, shapes, no_tensor, "model.gguf")
    assert message in str(caught.value)
    assert str(caught.value).startswith("model.gguf: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("architecture", ["mamba", "", None, 3, ["llama"], np.array([1, 2])])
def test_an_unknown_architecture_is_told_the_known_ones(architecture):
    with pytest.raises(InputError, match="supported: gpt2, gptneox, llama, qwen2, qwen3, phi3, gemma2, gemma3"):
        config_of({"general.architecture": architecture}, {}, no_tensor, "f")


def test_missing_and_odd_tensors():
    metadata, shapes = plain_file("llama")
    for name in ("token_embd.weight", "blk.0.attn_output.weight", "blk.0.ffn_down.weight", "blk.0.attn_k.weight"):
        less = {key: shape for key, shape in shapes.items() if key != name}
        with pytest.raises(InputError, match=f"holds no tensor {name}"):
            config_of(metadata, less, no_tensor, "f")
        with pytest.raises(InputError, match=f"tensor {name} is"):
            config_of(metadata, shapes | {name: ()}, no_tensor, "f")
    with pytest.raises(InputError, match="block_count is 2 instead of 3"):
        config_of(metadata, shapes | {"blk.7.attn_q.weight": (1,), f"blk.{'9' * 5000}.x": (1,)}, no_tensor, "f")
    with pytest.raises(InputError, match="no llama with such biases"):
        config_of(metadata, shapes | {"blk.0.attn_q.bias": (32,)}, no_tensor, "f")
    biases = {f"blk.0.ffn_{name}.bias": (48,) for name in ("gate", "up", "down")}
    with pytest.raises(InputError, match="no mistral with such biases"):
        config_of(metadata | {"llama.attention.sliding_window": 8}, shapes | biases, no_tensor, "f")


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.text(max_size=3), max_size=3),
    st.lists(st.integers(-4, 4), max_size=4).map(np.array),
    st.lists(st.booleans(), max_size=4).map(np.array),
    st.sampled_from(["none", "linear", "yarn", "longrope", "llama", 1, 2, 4, 8, 16, 32, 2.0]),
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(data=st.data())
def test_whatever_metadata_says_there_is_a_config_or_one_line(data):
    model_type = data.draw(st.sampled_from(sorted({config["model_type"] for config in CASES.values()})))
    metadata, shapes = plain_file(model_type)
    keys = sorted(metadata) + [metadata["general.architecture"] + key for key in MORE_KEYS]
    changes = data.draw(st.dictionaries(st.sampled_from(keys), JUNK, max_size=3))
    try:
        found = config_of(metadata | changes, shapes, no_tensor, "f")
    except InputError as error:
        fault = str(error)
    else:
        fault = ""
        transformers_config(json.loads(json.dumps(found, allow_nan=False)))
    assert "\n" not in fault


MORE_KEYS = (".rope.scaling.type", ".rope.scaling.factor", ".rope.scaling.attn_factor", ".rope.scale_linear")
MORE_KEYS += (".attention.sliding_window", ".attention.sliding_window_pattern", ".rope.freq_base_swa")
MORE_KEYS += (".rope.scaling.original_context_length", ".rope.scaling.yarn_beta_fast", ".expert_count")
