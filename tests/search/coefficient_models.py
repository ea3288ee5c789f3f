"""Tiny models of which one is a base, and others are that plus known differences."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from quantlab.loading import load_model
from quantlab.merging.config import read_config
from quantlab.merging.plan import plan_merge
from quantlab.merging.sources import open_sources
from quantlab.search.coefficient_model import MergedModel
from quantlab.search.coefficients import Coefficients, coefficients_of

SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def variant(source: Path, folder: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    """`source` with other weights."""
    shutil.copytree(source, folder)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def noise(source: Path, seed: int, size: float = 0.05) -> dict[str, torch.Tensor]:
    """Differences for every tensor."""
    generator = torch.Generator().manual_seed(seed)
    return {name: size * torch.randn(each.shape, generator=generator) for name, each in weights(source).items()}


def moved(source: Path, folder: Path, deltas: Mapping[str, torch.Tensor], factor: float = 1.0) -> Path:
    """`source` plus a multiple of differences."""
    return variant(source, folder, {name: w + factor * deltas[name] for name, w in weights(source).items()})


def config_text(method: str, base: Path | None, models: Mapping[Path, object], **parameters: object) -> str:
    """A merge config; each model with its weight."""
    content: dict[str, object] = {
        "merge_method": method,
        "models": [{"model": str(path), "parameters": {"weight": weight}} for path, weight in models.items()],
        "parameters": parameters,
    }
    if base is not None:
        content["base_model"] = str(base)
    return json.dumps(content) + "\n"


def opened(text: str, grain: str, start: Path, formats: Mapping | None = None, dtype=torch.float32):
    """What learns the config's coefficients, in a model of the shapes of `start`."""
    config = read_config(text)
    sources = open_sources(config.references)
    plan = plan_merge(config, sources)
    coefficients = coefficients_of(config, plan, grain)
    model = load_model(start, dtype=torch.float32).to(dtype)
    return MergedModel(model, plan.tensors, sources, coefficients, formats or {}), coefficients


def tokens(count: int, length: int, seed: int = 0, vocabulary: int = 512) -> list[tuple[int, ...]]:
    """Windows of random ids."""
    drawn = np.random.default_rng(seed).integers(3, vocabulary, (count, length))
    return [tuple(map(int, window)) for window in drawn]


def spread(coefficients: Coefficients, seed: int) -> np.ndarray:
    """Some coefficients near the start."""
    return coefficients.start + 0.2 * np.random.default_rng(seed).standard_normal(coefficients.start.shape)
