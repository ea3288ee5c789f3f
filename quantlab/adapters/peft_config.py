"""adapter_config.json for adapters that no training with peft made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Any

from quantlab.adapters.adapter import Adapter
from quantlab.adapters.targets import shortest_names


def peft_config(
    adapter: Adapter, base: str, *, tensors: Collection[str] | None = None, transposed: bool = False
) -> dict[str, Any]:
    """What peft's file says of an adapter: the ranks and scales of its pairs, and the modules they are for.

    Args:
        base: a path or hub id of the model.
        tensors: the base's tensors, where they are known: then modules are named by the ends of their names.
        transposed: whether the layers keep their weights as [in, out] (GPT-2's Conv1D).
    """
    modules = {name.removesuffix(".weight"): pair for name, pair in adapter.pairs.items()}
    common = Counter((pair.rank, pair.scale) for pair in modules.values()).most_common(1)
    rank, scale = common[0][0] if common else (1, 1.0)
    others = {name: pair for name, pair in modules.items() if (pair.rank, pair.scale) != (rank, scale)}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _number(rank * scale),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "target_modules": sorted(modules) if tensors is None else shortest_names(tensors, list(modules)),
        "rank_pattern": {name: pair.rank for name, pair in others.items() if pair.rank != rank},
        "alpha_pattern": {name: _number(pair.rank * pair.scale) for name, pair in others.items()},
        "use_rslora": False,
        "use_dora": adapter.has_magnitudes,
    }


def _number(value: float) -> float:
    return int(value) if value == int(value) else value
