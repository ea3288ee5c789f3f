"""Checkpoint in, quantized checkpoint out: one tensor in memory at a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quantlab.checkpoint import Checkpoint, CheckpointWriter, TensorEntry, open_checkpoint
from quantlab.checkpoint.reader import read_json
from quantlab.checkpoint.tensors import FLOAT_DTYPES
from quantlab.errors import InputError
from quantlab.formats import BlockFormat, Recipe, format_named
from quantlab.formats.blocks import BLOCK_SIZE
from quantlab.formats.recipe import QUANT_METHOD
from quantlab.quantization.recipes import default_recipe
from quantlab.quantization.rtn import relative_error, round_to_nearest

METHODS = {"rtn": round_to_nearest}

Progress = Callable[[int, int, str], None]  # (weights done, weights in all, the tensor at hand)


@dataclass(frozen=True)
class TensorReport:
    """One written tensor. `relative_error` is 0 for a tensor that was copied, None in a dry run; `note` says why it was
    copied, if one would have expected otherwise.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    relative_error: float | None
    note: str | None = None


@dataclass(frozen=True)
class QuantizeReport:
    """`bytes` counts tensor data; `bits_per_weight` is that over all parameters, unquantized ones included."""

    parameters: int
    bytes: int
    bits_per_weight: float
    source_bytes: int
    seconds: float
    tensors: tuple[TensorReport, ...]


def quantize_checkpoint(
    model: str | Path,
    out: Path,
    *,
    format: str = "q4_1",
    uniform: bool = False,
    method: str = "rtn",
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> QuantizeReport:
    """Quantize a float checkpoint into a Hugging Face folder of packed tensors.

    A quantized folder that quantlab wrote earlier may be replaced without `overwrite`; anything else may not.

    Args:
        model: folder or hub id.
        out: folder to make.
        format: the linear weights' format.
        uniform: embedding and head take `format` too, instead of Q8_0.
        method: how codes and scales are chosen; `rtn` rounds to nearest.
        dry_run: report shapes, formats and sizes, and write nothing (errors are None then).

    Raises:
        InputError: unknown format or method, an unreadable or already quantized model, a tensor with NaN, infinity or
            a scale beyond fp16, an `out` that exists or is the model itself, a full disk.
    """
    started = time.monotonic()
    chosen = format_named(format)
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}; choose one of: {', '.join(METHODS)}")
    checkpoint = open_checkpoint(model)
    if checkpoint.recipe is not None:
        raise InputError(f"{checkpoint.path}: is quantized already; start from the original model")
    recipe = default_recipe(checkpoint.family, chosen, uniform)
    _check_destination(checkpoint, out)
    plan = {name: _planned_format(checkpoint, recipe, name) for name in checkpoint.names}
    entries = [_planned_entry(checkpoint, name, format) for name, format in plan.items()]
    reports = [_report(checkpoint, recipe, name, format) for name, format in plan.items()]
    if not dry_run:
        config = _config(checkpoint, recipe, method)
        with CheckpointWriter(out, entries, config, replace=overwrite or _is_own_output(out)) as writer:
            reports = list(_write_tensors(checkpoint, writer, plan, reports, method, progress))
            writer.copy_companions(checkpoint.path)
    total = sum(entry.nbytes for entry in entries)
    return QuantizeReport(
        parameters=checkpoint.parameters,
        bytes=total,
        bits_per_weight=8 * total / checkpoint.parameters,
        source_bytes=checkpoint.nbytes,
        seconds=time.monotonic() - started,
        tensors=tuple(reports),
    )


def _check_destination(checkpoint: Checkpoint, out: Path) -> None:
    if out.suffix == ".gguf":
        raise InputError(f"{out}: GGUF output is not available yet; give a folder name")
    if out.exists() and checkpoint.path.resolve().is_relative_to(out.resolve()):
        raise InputError(f"{out}: is the model itself, or a folder around it; choose another folder")


def _is_own_output(out: Path) -> bool:
    """Whether `out` is a folder that quantlab quantized earlier, which a new run may replace."""
    if not (out / "config.json").is_file():
        return False
    try:
        quantization = read_json(out / "config.json").get("quantization_config")
    except InputError:
        return False
    return isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD


def _planned_format(checkpoint: Checkpoint, recipe: Recipe, name: str) -> BlockFormat | None:
    is_float = checkpoint.entry(name).dtype in FLOAT_DTYPES
    return recipe.format_for(name, checkpoint.shape(name)) if is_float else None


def _planned_entry(checkpoint: Checkpoint, name: str, format: BlockFormat | None) -> TensorEntry:
    if format is None:
        stored = checkpoint.entry(name)
        return TensorEntry(name, stored.dtype, stored.shape)
    rows, columns = checkpoint.shape(name)
    return TensorEntry(name, "U8", (rows, format.row_bytes(columns)))


def _report(checkpoint: Checkpoint, recipe: Recipe, name: str, format: BlockFormat | None) -> TensorReport:
    shape = checkpoint.shape(name)
    if format is not None:
        return TensorReport(name, shape, format.name, None)
    note = None
    if recipe.format_by_name(name) is not None:
        note = f"rows of {shape[-1]} are no multiple of {BLOCK_SIZE}" if shape else "has no rows"
    return TensorReport(name, shape, checkpoint.entry(name).dtype.lower(), None, note)


def _config(checkpoint: Checkpoint, recipe: Recipe, method: str) -> dict[str, Any]:
    """The model's config.json with the recipe, and how it was applied, as its quantization_config."""
    from importlib.metadata import version

    provenance = {"method": method, "quantlab_version": version("quantlab")}
    tying = {"tie_word_embeddings": checkpoint.tied}
    return {**checkpoint.config, **tying, "quantization_config": {**recipe.to_config(), **provenance}}


def _write_tensors(
    checkpoint: Checkpoint,
    writer: CheckpointWriter,
    plan: dict[str, BlockFormat | None],
    reports: list[TensorReport],
    method: str,
    progress: Progress | None,
) -> list[TensorReport]:
    done, written = 0, []
    for (name, format), report in zip(plan.items(), reports, strict=True):
        if progress is not None:
            progress(done, checkpoint.parameters, name)
        if format is None:
            writer.copy(name, checkpoint)
            report = replace(report, relative_error=0.0)
        else:
            weight = checkpoint.read(name)
            packed = METHODS[method](weight, format, f"{checkpoint.path}: {name}")
            writer.write_packed(name, packed)
            report = replace(report, relative_error=relative_error(weight, packed))
        written.append(report)
        done += checkpoint.entry(name).elements
    if progress is not None:
        progress(done, checkpoint.parameters, "")
    return written
