"""The nine model types side by side with GGUF's eight architectures, a row per type.

A row's defaults are those of transformers' configuration class, because config.json files may leave them out. What
llama.cpp's graph of an architecture has built in is what a row says that a config must say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from quantlab.checkpoint.checked_values import CheckedValues
from quantlab.checkpoint.rope import RopeUse

SILU = ("silu", "swish")
# ggml has the tanh approximation, through a table of fp16 numbers. The exact function (erf) is within 0.0005 of it, the
# table errs as much, and everybody runs Pythia, which was trained with the exact one, that way.
GELU = ("gelu", "gelu_python", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_python_tanh", "gelu_accurate")

_LLAMA_NAMES: Mapping[str, str] = {
    "context": "max_position_embeddings",
    "width": "hidden_size",
    "blocks": "num_hidden_layers",
    "feed_forward": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "epsilon": "rms_norm_eps",
}
SIZE_KEYS: Mapping[str, str] = {
    "context": "context_length",
    "width": "embedding_length",
    "blocks": "block_count",
    "feed_forward": "feed_forward_length",
    "heads": "attention.head_count",
    "kv_heads": "attention.head_count_kv",
    "epsilon": "attention.layer_norm_rms_epsilon",
}


@dataclass(frozen=True)
class ModelRow:
    """One model type.

    `names` are config.json's keys for the fields of `Sizes`, where they are not Llama's; transformers takes a key of
    `aliases` for the one that it maps to. `must` are settings that llama.cpp's graph has built in. Heads of a
    `free_heads` type have a width of their own, even where transformers wants the hidden size to be a multiple of their
    number (`whole_heads`); `grouped` types may share keys and values between heads.
    """

    model_type: str
    architecture: str
    model_class: str
    defaults: Mapping[str, Any]
    names: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    activation: str = "hidden_act"
    activations: tuple[str, ...] = SILU
    must: Mapping[str, bool] = field(default_factory=dict)
    rope: RopeUse | None = field(default_factory=RopeUse)
    free_heads: bool = False
    whole_heads: bool = True
    grouped: bool = True

    def name(self, size: str) -> str:
        """config.json's key for a field of `Sizes`."""
        return self.names.get(size, _LLAMA_NAMES[size])

    def key(self, size: str) -> str:
        """GGUF's key for it, below the architecture's name."""
        return "attention.layer_norm_epsilon" if size == "epsilon" and size in self.names else SIZE_KEYS[size]

    def config_values(self, config: Mapping[str, Any], source: str) -> CheckedValues:
        """config.json with this type's defaults, under its own names."""
        known = dict(config) | {name: config[alias] for alias, name in self.aliases.items() if alias in config}
        return CheckedValues(known, source, defaults=self.defaults, way_out="mend config.json")


def _defaults(**values: Any) -> dict[str, Any]:
    """What Llama-like types have in common, and what differs."""
    usual: dict[str, Any] = {
        "num_key_value_heads": None,
        "head_dim": None,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }
    return usual | values


_QWEN: dict[str, Any] = {
    "hidden_act": "silu",
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
_GEMMA: dict[str, Any] = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
}
_LLAMA_ROPE = RopeUse(("default", "linear", "yarn", "llama3", "longrope"))

ROWS: dict[str, ModelRow] = {
    row.model_type: row
    for row in (
        ModelRow(
            "gpt2",
            "gpt2",
            "GPT2LMHeadModel",
            {
                "vocab_size": 50257,
                "n_positions": 1024,
                "n_embd": 768,
                "n_layer": 12,
                "n_head": 12,
                "n_inner": None,
                "head_dim": None,
                "activation_function": "gelu_new",
                "layer_norm_epsilon": 1e-5,
                "scale_attn_weights": True,
                "scale_attn_by_inverse_layer_idx": False,
                "add_cross_attention": False,
                "tie_word_embeddings": True,
            },
            names={
                "context": "n_positions",
                "width": "n_embd",
                "blocks": "n_layer",
                "feed_forward": "n_inner",
                "heads": "n_head",
                "epsilon": "layer_norm_epsilon",
            },
            aliases={
                "max_position_embeddings": "n_positions",
                "hidden_size": "n_embd",
                "num_hidden_layers": "n_layer",
                "num_attention_heads": "n_head",
            },
            activation="activation_function",
            activations=GELU,
            must={
                "scale_attn_weights": True,
                "scale_attn_by_inverse_layer_idx": False,
                "add_cross_attention": False,
            },
            rope=None,
            grouped=False,
        ),
        ModelRow(
            "gpt_neox",
            "gptneox",
            "GPTNeoXForCausalLM",
            {
                "vocab_size": 50432,
                "hidden_size": 6144,
                "num_hidden_layers": 44,
                "num_attention_heads": 64,
                "intermediate_size": 24576,
                "hidden_act": "gelu",
                "max_position_embeddings": 2048,
                "layer_norm_eps": 1e-5,
                "use_parallel_residual": True,
                "attention_bias": True,
                "head_dim": None,
                "tie_word_embeddings": False,
            },
            names={"epsilon": "layer_norm_eps"},
            activations=GELU,
            must={"attention_bias": True},
            rope=RopeUse(partial=True, share=0.25, theta_key="rotary_emb_base", share_key="rotary_pct"),
            grouped=False,
        ),
        ModelRow(
            "llama",
            "llama",
            "LlamaForCausalLM",
            _defaults(
                hidden_act="silu",
                vocab_size=32000,
                hidden_size=4096,
                intermediate_size=11008,
                num_hidden_layers=32,
                num_attention_heads=32,
                max_position_embeddings=2048,
                attention_bias=False,
                mlp_bias=False,
            ),
            rope=_LLAMA_ROPE,
            free_heads=True,
        ),
        ModelRow(
            "mistral",
            "llama",
            "MistralForCausalLM",
            _defaults(
                hidden_act="silu",
                vocab_size=32000,
                hidden_size=4096,
                intermediate_size=14336,
                num_hidden_layers=32,
                num_attention_heads=32,
                num_key_value_heads=8,
                max_position_embeddings=131072,
                sliding_window=4096,
            ),
            rope=_LLAMA_ROPE,
            free_heads=True,
            whole_heads=False,
        ),
        ModelRow("qwen2", "qwen2", "Qwen2ForCausalLM", _defaults(**_QWEN)),
        ModelRow(
            "qwen3",
            "qwen3",
            "Qwen3ForCausalLM",
            _defaults(**_QWEN | {"head_dim": 128, "attention_bias": False}),
            must={"attention_bias": False},
            free_heads=True,
            whole_heads=False,
        ),
        ModelRow(
            "phi3",
            "phi3",
            "Phi3ForCausalLM",
            _defaults(
                hidden_act="silu",
                vocab_size=32064,
                hidden_size=3072,
                intermediate_size=8192,
                num_hidden_layers=32,
                num_attention_heads=32,
                max_position_embeddings=4096,
                original_max_position_embeddings=4096,
                rms_norm_eps=1e-5,
                sliding_window=None,
            ),
            rope=RopeUse(("default", "longrope"), partial=True, synonyms=(("su", "longrope"), ("yarn", "longrope"))),
        ),
        ModelRow(
            "gemma2",
            "gemma2",
            "Gemma2ForCausalLM",
            _defaults(
                **_GEMMA,
                vocab_size=256000,
                max_position_embeddings=8192,
                use_bidirectional_attention=None,
                attn_logit_softcapping=50.0,
                final_logit_softcapping=30.0,
            ),
            activation="hidden_activation",
            activations=GELU,
            must={"attention_bias": False, "use_bidirectional_attention": False},
            free_heads=True,
        ),
        ModelRow(
            "gemma3_text",
            "gemma3",
            "Gemma3ForCausalLM",
            _defaults(
                **_GEMMA,
                vocab_size=262208,
                max_position_embeddings=131072,
                sliding_window_pattern=6,
                use_bidirectional_attention=False,
                final_logit_softcapping=None,
            ),
            activation="hidden_activation",
            activations=GELU,
            must={"attention_bias": False, "use_bidirectional_attention": False},
            free_heads=True,
        ),
    )
}


def head_counts(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The keys of config.json that tell how many heads there are, with the type's defaults where they are missing."""
    values = ROWS[config["model_type"]].config_values(config, source)
    return {key: values.get(key, None) for key in ("num_attention_heads", "num_key_value_heads")}
