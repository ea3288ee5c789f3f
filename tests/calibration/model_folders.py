"""Model folders: copies with changes, and their tensors by the safetensors library."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import torch
from safetensors.torch import load_file, save_file

TOKENS = torch.arange(2 * 40).reshape(2, 40) * 7 % 512


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(TOKENS).logits


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, by the safetensors library."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def rows_of(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A float linear weight as [out, in]: GPT-2's lie as [in, out]."""
    is_conv1d = name.startswith("transformer.h.") and tensor.ndim == 2
    return tensor.T.contiguous() if is_conv1d else tensor


def gguf_blocks(tensor: torch.Tensor, format: str) -> torch.Tensor:
    kind = gguf.GGMLQuantizationType[format.upper()]
    return torch.from_numpy(gguf.quants.quantize(tensor.to(torch.float32).numpy(), kind))


def copy_of(model: Path, folder: Path, change=None, **config) -> Path:
    """A copy of a model folder, its tensors changed by `change(tensors)`, fields of config.json by `config`."""
    shutil.copytree(model, folder)
    if change is not None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def packed_names(folder: Path) -> set[str]:
    return {name for name, tensor in tensors_of(folder).items() if tensor.dtype == torch.uint8}


def spread(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, hidden ones too, with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
