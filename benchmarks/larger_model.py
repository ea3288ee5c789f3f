"""The shipped model and a Llama of 346 M parameters with random weights, both in Q4_1, made once in a folder."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from quantize_speed import CONFIG, make_model

from quantlab import native, quantize_checkpoint

SHIPPED = Path(__file__).parents[1] / "models" / "fable-9m"
SHAPE = {
    **CONFIG, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 30, "num_attention_heads": 16,
    "num_key_value_heads": 4, "vocab_size": 4096,
}  # fmt: skip


def packed_models(work: Path) -> dict[str, Path]:
    """Name -> folder of what is measured."""
    work.mkdir(parents=True, exist_ok=True)
    shipped, larger = work / "fable-9m-q4_1", work / "random-346m-q4_1"
    if not shipped.exists():
        quantize_checkpoint(SHIPPED, shipped)
    if not larger.exists():
        if not (work / "random-346m").exists():
            make_model(work / "random-346m", SHAPE)
        quantize_checkpoint(work / "random-346m", larger)
    return {"fable-9m": shipped, "random 346 M": larger}


def machine() -> str:
    """The processor, its cores, its kernel, and what else ran."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    load = f", load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return f"{name}, {os.cpu_count()} cores, kernel {native.cpu_kernel()}{load}"
