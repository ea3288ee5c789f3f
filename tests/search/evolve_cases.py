"""A base, two models made of it, texts to search and to judge by, and functions that score by the weights alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file

OPTIMUM = (0.3, 0.7)  # task arithmetic's weights that give the target
FILE = "model.safetensors"


def write_tuned(base: Path, folder: Path, seed: int) -> Path:
    """The base and something small of its own."""
    shutil.copytree(base, folder)
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(base / FILE)
    moved = {name: each + 0.05 * torch.randn(each.shape, generator=generator) for name, each in tensors.items()}
    save_file(moved, folder / FILE, {"format": "pt"})
    return folder


def write_family(base: Path, root: Path) -> dict[str, Path]:
    """base, a, b, and the target: base + 0.3 (a - base) + 0.7 (b - base)."""
    found = {"base": base, "a": write_tuned(base, root / "a", 1), "b": write_tuned(base, root / "b", 2)}
    tensors = {name: load_file(folder / FILE) for name, folder in found.items()}
    shutil.copytree(base, root / "target")
    target = {
        name: each + OPTIMUM[0] * (tensors["a"][name] - each) + OPTIMUM[1] * (tensors["b"][name] - each)
        for name, each in tensors["base"].items()
    }
    save_file(target, root / "target" / FILE, {"format": "pt"})
    return found | {"target": root / "target"}


def nearness(model: Path, target: Path) -> float:
    """Minus the distance of all weights from the target's."""
    ours, theirs = load_file(model / FILE), load_file(target / FILE)
    return -float(sum((ours[name].double() - each.double()).square().sum() for name, each in theirs.items()) ** 0.5)


def write_config(file: Path, **content: object) -> Path:
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def genome(models: dict[str, Path], **changes: object) -> dict[str, object]:
    found: dict[str, object] = {
        "models": [str(models["a"]), str(models["b"])],
        "base_model": str(models["base"]),
        "merge_method": "task_arithmetic",
    }
    return {key: value for key, value in (found | changes).items() if value is not None}


def write_texts(prose: Path, folder: Path) -> tuple[Path, Path]:
    """Two texts that share no line."""
    lines = [line for line in prose.read_text(encoding="utf-8").splitlines() if len(line) > 60]
    fitness, test = folder / "fitness.txt", folder / "test.txt"
    fitness.write_text("\n".join(lines[:6]), encoding="utf-8")
    test.write_text("\n".join(lines[6:12]), encoding="utf-8")
    return fitness, test
