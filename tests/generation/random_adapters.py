"""Adapters with random factors, and the model that they make when added to the weights in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import torch
from transformers.pytorch_utils import Conv1D

from quantlab import load_model
from quantlab.adapters.adapter import Adapter, LowRankPair
from quantlab.checkpoint import open_checkpoint
from quantlab.nn.swap import restore_modules


def random_adapter(
    model: Path, rank: int = 3, *, seed: int = 0, takes: Callable[[str], bool] = lambda name: True, size: float = 0.2
) -> Adapter:
    """Of every linear weight of the layers that `takes` names, with ranks from `rank` on."""
    checkpoint = open_checkpoint(model)
    random = np.random.default_rng(seed)
    pairs = {}
    for name in checkpoint.names:
        if not any(fnmatchcase(name, pattern) for pattern in checkpoint.family.linear) or not takes(name):
            continue
        rows, columns = checkpoint.shape(name)
        its_rank = rank + len(pairs) % 3
        a = random.normal(0, size / columns**0.5, (its_rank, columns)).astype(np.float32)
        b = random.normal(0, 1, (rows, its_rank)).astype(np.float32)
        pairs[name] = LowRankPair(a, b, 2.0 / its_rank**0.5)
    assert pairs
    return Adapter(Path("random"), "lora", pairs)


def merged_logits(model: Path, adapters: Sequence[tuple[Adapter, float]], ids: Sequence[int]) -> np.ndarray:
    """transformers' logits with W + weight * scale * B A for W, all in float64."""
    merged = load_model(model, dtype=torch.float64)
    restore_modules(merged, torch.float64)
    for adapter, weight in adapters:
        for name, pair in adapter.pairs.items():
            module = merged.get_submodule(name.removesuffix(".weight"))
            update = weight * pair.scale * torch.from_numpy(pair.b).double() @ torch.from_numpy(pair.a).double()
            with torch.no_grad():
                module.weight += update.T if isinstance(module, Conv1D) else update
    with torch.inference_mode():
        return merged(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0].numpy()
