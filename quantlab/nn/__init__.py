"""Torch modules over packed weights, and the one place that swaps modules."""

from quantlab.nn.embedding import QuantEmbedding
from quantlab.nn.fake_quant import FakeQuantEmbedding, FakeQuantLinear
from quantlab.nn.linear import QuantLinear, set_activations
from quantlab.nn.swap import fake_quantize_modules, restore_modules, swap_modules

__all__ = [
    "FakeQuantEmbedding",
    "FakeQuantLinear",
    "QuantEmbedding",
    "QuantLinear",
    "fake_quantize_modules",
    "restore_modules",
    "set_activations",
    "swap_modules",
]
