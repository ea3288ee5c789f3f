"""Models to merge, written straight as safetensors, and how tests read what came out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from quantlab.checkpoint import open_checkpoint

WIDTH, INNER, VOCABULARY, LAYERS = 64, 96, 40, 2
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": True,
}


def shapes(width: int = WIDTH, inner: int = INNER, layers: int = LAYERS, vocabulary: int = VOCABULARY):
    """Of a tied Llama's tensors, by name."""
    kinds = {
        "self_attn.q_proj.weight": (width, width),
        "self_attn.k_proj.weight": (width // 2, width),
        "self_attn.v_proj.weight": (width // 2, width),
        "self_attn.o_proj.weight": (width, width),
        "mlp.gate_proj.weight": (inner, width),
        "mlp.up_proj.weight": (inner, width),
        "mlp.down_proj.weight": (width, inner),
        "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
    }
    every = {f"model.layers.{layer}.{kind}": shape for layer in range(layers) for kind, shape in kinds.items()}
    return {"model.embed_tokens.weight": (vocabulary, width), **every, "model.norm.weight": (width,)}


def write_model(
    folder: Path,
    seed: int,
    *,
    dtype: torch.dtype = torch.float32,
    replaced: Mapping[str, torch.Tensor] | None = None,
    start: Path | None = None,
) -> Path:
    """A random model; `replaced` tensors are given, and with `start` it is that model plus something small."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes().items()}
    if start is not None:
        origin = load_file(start / "model.safetensors")
        tensors = {name: origin[name].float() + 0.1 * tensor for name, tensor in tensors.items()}
    tensors |= dict(replaced or {})
    return save_model(folder, {name: tensor.to(dtype) for name, tensor in tensors.items()}, CONFIG)


def save_model(folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, object]) -> Path:
    folder.mkdir()
    save_file(dict(tensors), folder / "model.safetensors")
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps({**config, "dtype": dtype}))
    return folder


def config_of(method: str, *models: object, base: object = None, **parameters: object) -> str:
    """A merge config; a model is a path or (path, its parameters)."""
    pairs = [model if isinstance(model, tuple) else (model, {}) for model in models]
    content: dict[str, object] = {
        "merge_method": method,
        "models": [{"model": str(path), "parameters": own} for path, own in pairs],
        "parameters": parameters,
    }
    if base is not None:
        content["base_model"] = str(base)
    return json.dumps(content) + "\n"


def weights(path: Path) -> dict[str, torch.Tensor]:
    """All weights, fp32."""
    checkpoint = open_checkpoint(path)
    return {name: checkpoint.read(name, torch.float32) for name in checkpoint.names}


def stored(path: Path) -> dict[str, bytes]:
    """All tensors' bytes."""
    checkpoint = open_checkpoint(path)
    return {name: checkpoint.read_bytes(name).tobytes() for name in checkpoint.names}


def files_of(path: Path) -> dict[str, bytes]:
    """A whole output by file name."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return {file.name: file.read_bytes() for file in files}


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)
