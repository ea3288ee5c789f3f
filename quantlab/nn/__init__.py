"""Torch modules over packed weights, and the one place that swaps modules."""

from quantlab.nn.embedding import QuantEmbedding
from quantlab.nn.linear import QuantLinear, set_activations
from quantlab.nn.swap import restore_modules, swap_modules

__all__ = ["QuantEmbedding", "QuantLinear", "restore_modules", "set_activations", "swap_modules"]
