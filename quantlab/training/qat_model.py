"""A model made ready for quantization-aware training: what of it is trained, and the blocks that come of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from quantlab.errors import InputError
from quantlab.formats import PackedTensor
from quantlab.loading import load_model
from quantlab.nn.fake_quant import FakeQuantLayer, FakeQuantLinear, fake_quant_layers
from quantlab.nn.fake_quant_lora import FakeQuantLoraLinear
from quantlab.nn.learnable_scales import make_scales_learnable
from quantlab.nn.swap import fake_quantize_modules
from quantlab.training.finetune_settings import FinetuneSettings
from quantlab.training.qat_plan import QatPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class QatModel:
    """`packed` gives the blocks of each packed tensor, by its full name: those that a forward pass multiplies by.
    `all_trained` tells whether the other tensors are trained too.
    """

    model: PreTrainedModel
    packed: Mapping[str, Callable[[], PackedTensor]]
    all_trained: bool


def float_model_for_qat(source: str | Path, plan: QatPlan, settings: FinetuneSettings, device: str) -> QatModel:
    """A float model that computes with the blocks its weights round to; with a LoRA where the plan has modules for one.

    Weights that are packed are fp32, everything else is in the settings' dtype.

    Raises:
        InputError: the model cannot be loaded, or a weight cannot be packed.
    """
    dtype = getattr(torch, settings.dtype)
    if settings.activations == "int8" and device != "cpu":
        raise InputError(f"--activations int8: computed on the CPU only, not on {device}; leave it out")
    model = load_model(source, dtype=torch.float32, device=device)
    fake_quantize_modules(model, plan.formats, activations=settings.activations, dtype=dtype)
    layers = dict(fake_quant_layers(model))
    own = {id(layer.weight) for layer in layers.values()}
    for parameter in model.parameters():
        if id(parameter) not in own:
            parameter.data = parameter.data.to(dtype)
    model.requires_grad_(not plan.adapted)
    if plan.adapted:
        _adapt(model, layers, plan, settings)
        layers = dict(fake_quant_layers(model))
    packed = {
        f"{name}.weight": layer.packed_weight for name, layer in layers.items() if f"{name}.weight" in plan.formats
    }
    assert packed.keys() == plan.formats.keys(), sorted(plan.formats.keys() - packed.keys())
    for layer in layers.values():  # a damaged weight shows before any work is done
        layer.packed_weight()
    return QatModel(model, packed, all_trained=not plan.adapted)


def _adapt(
    model: PreTrainedModel, layers: dict[str, FakeQuantLayer], plan: QatPlan, settings: FinetuneSettings
) -> None:
    scale = settings.alpha / (settings.rank**0.5 if settings.rslora else settings.rank)
    for name in plan.adapted:
        layer = layers[name]
        assert isinstance(layer, FakeQuantLinear)
        model.set_submodule(name, FakeQuantLoraLinear(layer, settings.rank, scale))


def packed_model_for_qat(
    start: str | Path, settings: FinetuneSettings, device: str, *, minimums_only: bool
) -> QatModel:
    """A quantized model with trainable d and m, or m alone; its codes and all other tensors are frozen."""
    model = load_model(start, dtype=getattr(torch, settings.dtype), device=device)
    blocks = make_scales_learnable(model)
    if minimums_only:
        for learnable in blocks.values():
            learnable.stretch.requires_grad_(False)
    packed = {name: learnable.packed for name, learnable in blocks.items()}
    return QatModel(model, packed, all_trained=False)
