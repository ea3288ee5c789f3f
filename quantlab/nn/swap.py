"""Swap a transformers model's modules for packed ones, as a recipe says: the one place that knows module types."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from quantlab.formats import Recipe
from quantlab.nn.embedding import QuantEmbedding
from quantlab.nn.linear import QuantLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def swap_modules(model: PreTrainedModel, recipe: Recipe) -> list[str]:
    """Replace, in place, every module whose weight `recipe` gives a format; its blocks are zero until loaded.

    Works on any device, meta included. A head that is tied to the embedding takes the embedding's format.

    Returns:
        The names of the replaced modules.
    """
    swapped = []
    for name, module in list(model.named_modules()):
        replacement = _replacement(module, _full_name(model, name), recipe, _tied_source(model, module))
        if replacement is not None:
            model.set_submodule(name, replacement)
            swapped.append(name)
    return swapped


def _full_name(model: PreTrainedModel, module_name: str) -> str:
    """The weight's name in the causal language model, also when `model` is the bare model inside it."""
    prefix = model.base_model_prefix
    bare = bool(prefix) and not hasattr(model, prefix)
    return f"{prefix}.{module_name}.weight" if bare else f"{module_name}.weight"


def _tied_source(model: PreTrainedModel, module: nn.Module) -> str | None:
    """The embedding weight's name when `module` is a head that is tied to it."""
    if not model.config.get_text_config().tie_word_embeddings or module is not model.get_output_embeddings():
        return None
    embedding = model.get_input_embeddings()
    return next(f"{name}.weight" for name, candidate in model.named_modules() if candidate is embedding)


def _replacement(module: nn.Module, name: str, recipe: Recipe, tied_source: str | None) -> nn.Module | None:
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear) and type(module) is nn.Linear:  # packed and adapted ones are subclasses
        out_features, in_features, transposed = module.out_features, module.in_features, False
    elif isinstance(module, Conv1D):
        (in_features, out_features), transposed = tuple(module.weight.shape), True
    elif isinstance(module, nn.Embedding) and type(module) is nn.Embedding:
        format = recipe.format_for(name, (module.num_embeddings, module.embedding_dim))
        return None if format is None else QuantEmbedding(
            module.num_embeddings,
            module.embedding_dim,
            format=format,
            padding_idx=module.padding_idx,
            dtype=module.weight.dtype,
            device=module.weight.device,
        )  # fmt: skip
    else:
        return None
    format = recipe.format_for(tied_source or name, (out_features, in_features))
    weight: torch.Tensor = module.weight
    return None if format is None else QuantLinear(
        in_features,
        out_features,
        bias=module.bias is not None,
        format=format,
        transposed=transposed,
        dtype=weight.dtype,
        device=weight.device,
    )  # fmt: skip
