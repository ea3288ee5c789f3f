"""Untrained models of every family, in memory."""

from __future__ import annotations

from typing import Any

import torch

SHAPE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64,
}  # fmt: skip
GEMMA = {**SHAPE, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8, "final_logit_softcapping": 5.0}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SHAPE,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "resid_pdrop": 0.0},
    "mistral": {**SHAPE, "sliding_window": 8},
    "qwen2": SHAPE,
    "qwen3": {**SHAPE, "head_dim": 16},
    "gpt_neox": {name: value for name, value in SHAPE.items() if name != "num_key_value_heads"},
    "phi3": {**SHAPE, "pad_token_id": 0},
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
}


def tiny(family: str, tied: bool) -> Any:  # Any: a transformers model
    """A model of 96 tokens, its matrices drawn wide, so that samples that saw each other would show."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, vocab_size=96, **{**FAMILIES[family], "tie_word_embeddings": tied})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.3)
    return model
