"""Adapters on a torch model: y = W x + B (A x), the update in fp32, or other blocks in packed layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def add_adapters(model: PreTrainedModel, factors: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Hook the updates of `stacked_factors` to the modules whose weights they are for."""
    for name, (a, b) in factors.items():
        module = model.get_submodule(name.removesuffix(".weight"))
        device = next(module.parameters()).device
        module.register_forward_hook(_Update(torch.from_numpy(a).to(device), torch.from_numpy(b).to(device)))


def replace_blocks(model: PreTrainedModel, fused: Mapping[str, np.ndarray]) -> None:
    """Put other blocks, uint8 [out, row_bytes], into packed layers."""
    for name, blocks in fused.items():
        weight = model.get_parameter(name)
        weight.data = torch.from_numpy(blocks).to(weight.device)


class _Update:
    """Adds B (A x) to what a module gives for x."""

    def __init__(self, a: torch.Tensor, b: torch.Tensor) -> None:
        self._a, self._b = a, b

    def __call__(self, module: torch.nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        update = F.linear(F.linear(inputs[0].to(torch.float32), self._a), self._b)
        return output + update.to(output.dtype)
