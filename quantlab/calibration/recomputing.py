"""A training step's activations, kept whole or, where they would fill the memory, computed a second time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KEPT_ACTIVATIONS = 2 << 30  # bytes; where a pass needs more, blocks are computed twice instead
WIDTHS, INNER_WIDTHS = 12, 4  # numbers a token and layer, by hidden size and by the feed-forward's


def activation_bytes(config: Mapping[str, Any], tokens: int) -> int:
    """What a pass forward in fp32 keeps for the pass back, about; `config` is config.json's."""
    hidden, layers = _number(config, "hidden_size", "n_embd"), _number(config, "num_hidden_layers", "n_layer")
    inner = _number(config, "intermediate_size", "n_inner") or 4 * hidden
    return 4 * tokens * layers * (WIDTHS * hidden + INNER_WIDTHS * inner)


def recompute_if_large(model: PreTrainedModel, tokens: int) -> None:
    """Where activations of so many tokens would be too many, keep only those between blocks."""
    import torch

    if activation_bytes(model.config.get_text_config().to_dict(), tokens) <= KEPT_ACTIVATIONS:
        return
    for module in model.modules():  # only a model in training mode recomputes, and then it would drop activations too
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()


def _number(config: Mapping[str, Any], *keys: str) -> int:
    return next((n for key in keys if isinstance(n := config.get(key), int)), 0)
