"""What transformers calls for `quant_method: "quantlab"`: swap the modules, then load the blocks one to one."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from quantlab.formats import Recipe
from quantlab.formats.recipe import QUANT_METHOD
from quantlab.nn import QuantEmbedding, QuantLinear, swap_modules


class QuantlabConfig(QuantizationConfigMixin):
    """A recipe in the shape of a transformers quantization config."""

    def __init__(self, **config: Any) -> None:  # Any: the fields of config.json, kept as they are
        self.quant_method = QUANT_METHOD
        self.recipe = Recipe.from_config({"quant_method": QUANT_METHOD, **config}, "quantization_config")
        self._config = {key: value for key, value in config.items() if key != "quant_method"}

    def to_dict(self) -> dict[str, Any]:
        """The fields of config.json."""
        return {"quant_method": QUANT_METHOD, **self._config}


class QuantlabQuantizer(HfQuantizer):
    """Loads folders that `quantlab quantize` wrote; it quantizes nothing itself."""

    requires_calibration = True  # transformers' word for: only checkpoints that are quantized already
    quantization_config: QuantlabConfig

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:  # transformers' signature
        swap_modules(model, self.quantization_config.recipe)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:  # transformers' signature
        for name, module in list(model.named_modules()):
            if isinstance(module, (QuantLinear, QuantEmbedding)):
                model.set_submodule(name, _float_module(module, dtype or torch.float32))
        model.tie_weights()
        return model

    def is_serializable(self) -> bool:
        """Packed weights save as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters train on top of packed weights."""
        return True


def _float_module(module: QuantLinear | QuantEmbedding, dtype: torch.dtype) -> nn.Module:
    weight = module.packed_weight().dequantize(dtype)
    result: nn.Module
    if isinstance(module, QuantEmbedding):
        result = nn.Embedding(
            module.num_embeddings, module.embedding_dim, module.padding_idx, device="meta", dtype=dtype
        )
    elif module.transposed:
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):
            result = Conv1D(module.out_features, module.in_features)
        weight = weight.T.contiguous()
    else:
        result = nn.Linear(
            module.in_features, module.out_features, bias=module.bias is not None, device="meta", dtype=dtype
        )
    result.weight = nn.Parameter(weight)
    if isinstance(module, QuantLinear) and module.bias is not None:
        result.bias = nn.Parameter(module.bias.detach().to(dtype))
    return result
