"""What transformers calls for `quant_method: "quantlab"`: swap the modules, then load the blocks one to one."""

from __future__ import annotations

from typing import Any

import torch
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from quantlab.formats import Recipe
from quantlab.formats.recipe import QUANT_METHOD
from quantlab.nn import restore_modules, swap_modules


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
        restore_modules(model, dtype or torch.float32)
        return model

    def is_serializable(self) -> bool:
        """Packed weights save as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters train on top of packed weights."""
        return True
