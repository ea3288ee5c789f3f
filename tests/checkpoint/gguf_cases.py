"""Tiny models of all nine types in many settings, and their tensors' places in a GGUF file."""

from __future__ import annotations

import copy
import functools
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from quantlab.checkpoint.families import FAMILIES
from quantlab.checkpoint.gguf_config import CONFIG_KEY, metadata_of

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NEOX = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"} | {"hidden_size": 64}
GPT2 = {"vocab_size": 96, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}
GEMMA = SIZES | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}
PHI3 = SIZES | {"pad_token_id": 0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "factor": 2.5}
SLIDING, FULL = "sliding_attention", "full_attention"


def longrope(columns: int, **more: Any) -> dict[str, Any]:
    short = [1.0 + n / 8 for n in range(columns)]
    return {"short_factor": short, "long_factor": [2.0 + n / 3 for n in range(columns)], **more}


CASES: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2", **GPT2},
    "gpt2-inner": {"model_type": "gpt2", **GPT2, "n_inner": 48, "layer_norm_epsilon": 1e-6},
    "gpt2-untied": {"model_type": "gpt2", **GPT2, "tie_word_embeddings": False},
    "neox": {"model_type": "gpt_neox", **NEOX, "rotary_pct": 0.25},
    "neox-sequential": {"model_type": "gpt_neox", **NEOX, "use_parallel_residual": False, "rotary_emb_base": 500},
    "neox-tied-linear": {
        "model_type": "gpt_neox",
        **NEOX,
        "tie_word_embeddings": True,
        "rope_parameters": {**LINEAR, "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    },
    "neox-yarn": {"model_type": "gpt_neox", **NEOX, "rope_scaling": YARN},
    "llama": {"model_type": "llama", **SIZES, "rms_norm_eps": 1e-5},
    "llama-wide-heads": {"model_type": "llama", **SIZES, "head_dim": 16, "rope_theta": 500000.0},
    "llama-biases": {"model_type": "llama", **SIZES, "attention_bias": True, "mlp_bias": True},
    "llama-tied": {"model_type": "llama", **SIZES, "tie_word_embeddings": True},
    "llama-llama3": {
        "model_type": "llama",
        **SIZES,
        "head_dim": 16,
        "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 32},
    },
    "llama-new-llama3": {
        "model_type": "llama",
        **SIZES,
        "head_dim": 32,
        "rope_parameters": {**LLAMA3, "rope_theta": 500000.0, "original_max_position_embeddings": 8192},
    },
    "llama-linear": {"model_type": "llama", **SIZES, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "llama-yarn": {"model_type": "llama", **SIZES, "rope_scaling": YARN},
    "llama-longrope": {
        "model_type": "llama",
        **SIZES,
        "rope_scaling": longrope(4, rope_type="longrope", original_max_position_embeddings=16),
    },
    "llama-divisors": {
        "model_type": "llama",
        **SIZES,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "factor": 1.0,
            "attention_factor": 1.0,
            "short_factor": [1.0, 1.25, 3.0, 7.7],
            "long_factor": [1.0, 1.25, 3.0, 7.7],
        },
    },
    "llama-yarn-attention": {"model_type": "llama", **SIZES, "rope_scaling": YARN | {"attention_factor": 1.7}},
    "mistral": {"model_type": "mistral", **SIZES, "sliding_window": 8},
    "mistral-full": {"model_type": "mistral", **SIZES, "sliding_window": None},
    "qwen2": {"model_type": "qwen2", **SIZES, "rope_theta": 1000000.0},
    "qwen2-sliding": {
        "model_type": "qwen2",
        **SIZES,
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 1,
    },
    "qwen2-yarn-without-factor": {"model_type": "qwen2", **SIZES, "rope_scaling": YARN | {"factor": None}},
    "qwen3": {"model_type": "qwen3", **SIZES, "head_dim": 16, "tie_word_embeddings": True},
    "qwen3-yarn": {"model_type": "qwen3", **SIZES, "head_dim": 16, "rope_scaling": YARN},
    "qwen3-yarn-mscale": {
        "model_type": "qwen3",
        **SIZES,
        "head_dim": 16,
        "rope_scaling": YARN | {"mscale": 1.5, "mscale_all_dim": 0.5},
    },
    "qwen3-sliding": {
        "model_type": "qwen3",
        **SIZES,
        "head_dim": 16,
        "use_sliding_window": True,
        "sliding_window": 8,
        "layer_types": [SLIDING, FULL],
    },
    "phi3": {"model_type": "phi3", **PHI3, "sliding_window": 8},
    "phi3-partial": {"model_type": "phi3", **PHI3, "partial_rotary_factor": 0.75, "hidden_size": 64},
    "phi3-longrope": {
        "model_type": "phi3",
        **PHI3,
        "original_max_position_embeddings": 16,
        "rope_scaling": longrope(4, type="longrope"),
    },
    "phi3-su": {
        "model_type": "phi3",
        **PHI3,
        "original_max_position_embeddings": 16,
        "rope_scaling": longrope(4, rope_type="su", original_max_position_embeddings=16, attention_factor=1.25),
    },
    "gemma2": {"model_type": "gemma2", **GEMMA, "rope_theta": 5000.0, "attn_logit_softcapping": 2.0},
    "gemma2-layers": {
        "model_type": "gemma2",
        **GEMMA,
        "num_hidden_layers": 3,
        "layer_types": [FULL, SLIDING, SLIDING],
        "final_logit_softcapping": 3.0,
    },
    "gemma2-linear": {"model_type": "gemma2", **GEMMA, "rope_scaling": LINEAR},
    "gemma3": {
        "model_type": "gemma3_text",
        **GEMMA,
        "num_hidden_layers": 7,
        "sliding_window_pattern": 6,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "rope_local_base_freq": 777.0,
    },
    "gemma3-layers": {
        "model_type": "gemma3_text",
        **GEMMA,
        "layer_types": [FULL, SLIDING],
        "final_logit_softcapping": 3.0,
        "rope_parameters": {
            FULL: {"rope_type": "default", "rope_theta": 5000.0},
            SLIDING: {"rope_type": "default", "rope_theta": 100.0},
        },
    },
    "gemma3-full": {"model_type": "gemma3_text", **GEMMA, "sliding_window_pattern": 1},
    "gemma3-yarn": {"model_type": "gemma3_text", **GEMMA, "sliding_window_pattern": 2, "rope_scaling": YARN},
}


def transformers_config(config: dict[str, Any]):
    values = copy.deepcopy(config)
    return AutoConfig.for_model(values.pop("model_type"), **values)


def make_model(config: dict[str, Any]):
    """Weights drawn wide, so that attention has something to say; biases and norms too."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(transformers_config(config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


@functools.cache
def model_of(case: str):
    """The case's model, for all who leave it as it is."""
    return make_model(CASES[case])


def gguf_shapes(model, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the model's tensors in a GGUF file; a tied head has none."""
    family = FAMILIES[config["model_type"]]
    shapes = {}
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        shapes[family.gguf_name(name)] = shape[::-1] if family.is_transposed(name) else shape
    return shapes


def no_tensor(name: str) -> np.ndarray:
    raise AssertionError(f"asked for {name}")


def plain_file(model_type: str, **more: Any) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Metadata and shapes of the plain case of a type, without our own key."""
    case = {"gpt_neox": "neox", "gemma3_text": "gemma3"}.get(model_type, model_type)
    config = CASES[case]
    metadata = metadata_of(config, 96, "f").metadata
    del metadata[CONFIG_KEY]
    return metadata | more, gguf_shapes(model_of(case), config)
