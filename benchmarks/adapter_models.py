"""Adapted models as training computes them, and models scored side by side on the same samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import LoraLayer

from quantlab.adapters.fused_layers import FusedLoraLinear, fused_weight
from quantlab.adapters.fusing import block_factors, packed_bytes
from quantlab.adapters.reading import read_adapter
from quantlab.checkpoint import Checkpoint, open_checkpoint
from quantlab.loading import load_model
from quantlab.training.adapted_model import ADAPTER, check_base, with_adapter
from quantlab.training.finetune_settings import FinetuneSettings
from quantlab.training.sample import NO_LOSS, Sample

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Scored:
    """By model: `losses`, the summed loss of each sample in nats, fp64 [models, samples]; `logits`, the largest
    absolute difference of a logit to the first model's, [models].
    """

    losses: np.ndarray
    logits: np.ndarray


def live_model(base: Path, adapter: Path, settings: FinetuneSettings, activations: str) -> Any:  # Any: peft's model
    """The base with a written adapter in the layers that training used; with plain settings (method "lora", not
    merge-aware) any adapter becomes the side branch that peft and llama.cpp make of its files.
    """
    checkpoint = open_checkpoint(base)
    modules = check_base(checkpoint, settings)
    model = with_adapter(load_model(base, activations=activations), checkpoint, modules, settings)
    pairs = read_adapter(adapter).pairs
    with torch.no_grad():
        for name, layer in adapted_layers(model):
            pair = pairs[f"{name}.weight"]
            a = block_factors(pair.a) if settings.method == "block-sum" else pair.a
            layer.lora_A[ADAPTER].weight.copy_(torch.from_numpy(a))
            layer.lora_B[ADAPTER].weight.copy_(torch.from_numpy(pair.b))
    return model.eval()


def adapted_layers(model: Any) -> Iterator[tuple[str, Any]]:
    """peft's layers by the base model's names."""
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            yield name, layer


def differing_bytes(live: Any, base: Path, fused: Path) -> int:
    """How many bytes of the fused file are not those that the live layers compute with, or, of tensors without an
    adapter, not the base's.
    """
    written, source = open_checkpoint(fused), open_checkpoint(base)
    adapted = {f"{name}.weight": layer for name, layer in adapted_layers(live)}
    count = 0
    for name in source.names:
        expected = _live_blocks(adapted[name]) if name in adapted else source.read_bytes(name)
        count += int((_stored(written, name, name in adapted) != expected).sum())
    return count


def _stored(checkpoint: Checkpoint, name: str, packed: bool) -> np.ndarray:
    return packed_bytes(checkpoint, name) if packed else checkpoint.read_bytes(name)


def _live_blocks(layer: FusedLoraLinear) -> np.ndarray:
    factors = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    return fused_weight(layer.get_base_layer(), *factors, layer.scaling[ADAPTER], layer.fusion).numpy()


def scored(models: Sequence[Any], samples: Sequence[Sample], progress: Progress) -> Scored:
    """All models over all samples, one sample at a time; logits of every position count, losses of labelled tokens."""
    losses, largest = np.zeros((len(models), len(samples))), np.zeros(len(models))
    with torch.no_grad():
        for number, sample in enumerate(samples):
            ids, targets = torch.tensor(sample.input_ids)[None], torch.tensor(sample.labels[1:])
            counted = targets != NO_LOSS
            first = None
            for model, row in zip(models, range(len(models)), strict=True):
                logits = model(input_ids=ids, use_cache=False).logits[0]
                first = logits if first is None else first
                largest[row] = max(largest[row], float((logits - first).abs().max()))
                chosen = logits[:-1][counted].double()
                losses[row, number] = float(F.cross_entropy(chosen, targets[counted], reduction="sum"))
            progress(number + 1, len(samples), "")
    return Scored(losses, largest)


def label_counts(samples: Sequence[Sample]) -> np.ndarray:
    """Tokens that carry loss, fp64 [samples]."""
    return np.array([float(len(sample.trained)) for sample in samples])
