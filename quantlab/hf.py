"""`import quantlab.hf` teaches transformers to load folders that quantlab quantized; registration is all it does."""

from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)

from quantlab.formats.recipe import QUANT_METHOD
from quantlab.quantization.transformers_hook import QuantlabConfig, QuantlabQuantizer

if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:  # a reload of this module registers once
    register_quantization_config(QUANT_METHOD)(QuantlabConfig)
    register_quantizer(QUANT_METHOD)(QuantlabQuantizer)
