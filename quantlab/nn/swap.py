"""Swap a transformers model's modules for packed ones, as a recipe says: the one place that knows module types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from quantlab.formats import BlockFormat, Recipe
from quantlab.nn.embedding import QuantEmbedding
from quantlab.nn.fake_quant import FakeQuantEmbedding, FakeQuantLinear
from quantlab.nn.linear import QuantLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# transformers' embeddings that multiply their output by a constant
SCALED_EMBEDDINGS = ("Gemma2TextScaledWordEmbedding", "Gemma3TextScaledWordEmbedding")


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

    # Exact types: packed and adapted layers are subclasses.
    if isinstance(module, nn.Linear) and type(module) is nn.Linear:
        out_features, in_features, transposed = module.out_features, module.in_features, False
    elif isinstance(module, Conv1D):
        (in_features, out_features), transposed = tuple(module.weight.shape), True
    elif isinstance(module, nn.Embedding):
        return _packed_embedding(module, name, recipe)
    else:
        return None
    format = recipe.format_for(tied_source or name, (out_features, in_features))
    if format is None:
        return None
    weight: torch.Tensor = module.weight
    return QuantLinear(
        in_features,
        out_features,
        bias=module.bias is not None,
        format=format,
        transposed=transposed,
        dtype=weight.dtype,
        device=weight.device,
    )


def _embedding_scale(module: nn.Embedding) -> float | None:
    return getattr(module, "scalar_embed_scale", None) if type(module).__name__ in SCALED_EMBEDDINGS else None


def _packed_embedding(module: nn.Embedding, name: str, recipe: Recipe) -> QuantEmbedding | None:
    scale = _embedding_scale(module)
    format = recipe.format_for(name, (module.num_embeddings, module.embedding_dim))
    if format is None or (scale is None and type(module) is not nn.Embedding):
        return None
    return QuantEmbedding(
        module.num_embeddings,
        module.embedding_dim,
        format=format,
        padding_idx=module.padding_idx,
        scale=scale,
        dtype=module.weight.dtype,
        device=module.weight.device,
    )


def fake_quantize_modules(
    model: PreTrainedModel,
    formats: Mapping[str, BlockFormat],
    *,
    activations: str = "float",
    dtype: torch.dtype | None = None,
) -> list[str]:
    """Replace, in place, every module whose weight has a format by one that packs its float weight for every product.

    Parameters stay the same objects, tied ones tied: a head that is tied to the embedding takes the embedding's format.

    Args:
        formats: by the weights' full names; levels count.
        activations: of linear layers; with "auto" int8 on a CPU and, with formats whose activations have one scale a
            token, everywhere.
        dtype: of the embedding's output; that of its weight if not given.

    Returns:
        The names of the replaced modules.
    """
    from transformers.pytorch_utils import Conv1D

    swapped = []
    for name, module in list(model.named_modules()):
        full = _full_name(model, name)
        format = formats.get(_tied_source(model, module) or full)
        if format is None:
            continue
        replacement: nn.Module
        if type(module) is nn.Linear or isinstance(module, Conv1D):
            replacement = FakeQuantLinear(
                module,
                format,
                transposed=isinstance(module, Conv1D),
                activations=_trained_activations(activations, format, module.weight.device),
                name=full,
            )
        elif isinstance(module, nn.Embedding):
            scale = _embedding_scale(module)
            if scale is None and type(module) is not nn.Embedding:
                continue
            replacement = FakeQuantEmbedding(module, format, scale=scale, dtype=dtype, name=full)
        else:
            continue
        model.set_submodule(name, replacement)
        swapped.append(name)
    return swapped


def _trained_activations(asked: str, format: BlockFormat, device: torch.device) -> str:
    if asked != "auto":
        return asked
    return "int8" if device.type == "cpu" or format.activations == "token" else "float"


def restore_modules(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """The way back, in place: every packed module becomes a float one with the dequantized weight in `dtype`."""
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantEmbedding):
            model.set_submodule(name, _float_embedding(module, dtype))
        elif isinstance(module, QuantLinear):
            model.set_submodule(name, _float_linear(module, dtype))
    model.tie_weights()


def _float_embedding(module: QuantEmbedding, dtype: torch.dtype) -> nn.Embedding:
    weight = module.packed_weight().dequantize(dtype)
    if module.scale is None:
        return nn.Embedding.from_pretrained(weight, freeze=False, padding_idx=module.padding_idx)
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    with torch.device("meta"):
        result: nn.Embedding = Gemma3TextScaledWordEmbedding(
            module.num_embeddings, module.embedding_dim, module.padding_idx, embed_scale=module.scale
        )
    result.weight = nn.Parameter(weight)
    result.embed_scale = torch.tensor(module.scale, device=weight.device)
    return result


def _float_linear(module: QuantLinear, dtype: torch.dtype) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    weight = module.packed_weight().dequantize(dtype)
    result: nn.Module
    with torch.device("meta"):
        if module.transposed:
            result, weight = Conv1D(module.out_features, module.in_features), weight.T.contiguous()
        else:
            result = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
    result.weight = nn.Parameter(weight)
    if module.bias is not None:
        result.bias = nn.Parameter(module.bias.detach().to(dtype))
    return result
