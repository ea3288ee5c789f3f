"""Adapters as GGUF files, which llama.cpp adds to a model at run time (`--lora`).

The layout is that of its src/llama-adapter.cpp: `general.type` is "adapter", `adapter.type` "lora", and every adapted
tensor has `<name>.lora_a` [rank, in] and `<name>.lora_b` [out, rank] under its GGUF name, rows in GGUF's order. The
update is scaled by `adapter.lora.alpha` / rank, or by 1 where alpha is 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quantlab.adapters.adapter import Adapter, LowRankPair, check_fits
from quantlab.adapters.reading import check_not_around
from quantlab.checkpoint.atomic import atomic_file
from quantlab.checkpoint.checkpoint import Checkpoint
from quantlab.checkpoint.export import check_outside
from quantlab.errors import InputError


@dataclass(frozen=True)
class AdapterExport:
    """`lossless`: the file's factors and scales are the adapter's, to the bit."""

    bytes: int
    lossless: bool
    tensors_changed: int
    tensors: int
    parameters: int


def export_adapter(adapter: Adapter, base: Checkpoint, out: Path, *, overwrite: bool = False) -> AdapterExport:
    """Write an adapter as a GGUF file for the base's architecture.

    Args:
        base: the model that it was trained on, whose configuration tells the order of rows in GGUF.

    Raises:
        InputError: the adapter does not fit the base, is a DoRA, or adapts what has no name in GGUF; `out` exists, or
            is the base or the adapter itself.
    """
    import gguf

    check_outside(base, out)
    check_not_around(adapter.path, out)
    check_fits(adapter, base)
    if adapter.has_magnitudes:
        raise InputError(f"{adapter.path}: is a DoRA, which GGUF adapters cannot hold; fuse it and export the model")
    alpha = _common_alpha(adapter)
    with atomic_file(out, overwrite) as temporary:
        writer = gguf.GGUFWriter(temporary, base.family.gguf.architecture)
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        writer.add_string("quantlab.method", adapter.method)
        for name, pair in adapter.pairs.items():
            stored = base.family.gguf_name(name)
            if stored is None:
                raise InputError(f"{adapter.path}: {name} has no name in GGUF; llama.cpp cannot apply it")
            writer.add_tensor(f"{stored}.lora_a", np.ascontiguousarray(pair.a))
            writer.add_tensor(f"{stored}.lora_b", _stored_b(pair, base, name, alpha))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    folded = 0 if alpha else sum(pair.scale != 1 for pair in adapter.pairs.values())
    return AdapterExport(out.stat().st_size, not folded, folded, len(adapter.pairs), adapter.parameters)


def _common_alpha(adapter: Adapter) -> float:
    """The alpha that gives every pair's scale; 0 if there is no single one that fp32 holds: scales go into B then."""
    alphas = {np.float32(pair.scale * pair.rank) for pair in adapter.pairs.values()}
    if len(alphas) != 1:
        return 0.0
    alpha = alphas.pop()
    is_exact = all(alpha / np.float32(pair.rank) == np.float32(pair.scale) for pair in adapter.pairs.values())
    return float(alpha) if is_exact else 0.0


def _stored_b(pair: LowRankPair, base: Checkpoint, name: str, alpha: float) -> np.ndarray:
    b = pair.b if alpha else np.float32(pair.scale) * pair.b
    rows = base.family.gguf_rows(name, len(b), base.config)
    return np.ascontiguousarray(b if rows is None else b[rows])
