"""Checkpoint in, quantized checkpoint out: one tensor in memory at a time."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from quantlab.checkpoint import Checkpoint, CheckpointWriter, TensorEntry, open_checkpoint, open_writer
from quantlab.checkpoint.expected_shapes import check_shapes
from quantlab.checkpoint.export import check_outside
from quantlab.checkpoint.gguf_file import GgufFile
from quantlab.checkpoint.reader import read_json
from quantlab.checkpoint.tensors import DTYPE_BYTES, FLOAT_DTYPES
from quantlab.errors import InputError
from quantlab.formats import BlockFormat, Recipe, format_named
from quantlab.formats.blocks import BLOCK_SIZE
from quantlab.formats.recipe import QUANT_METHOD
from quantlab.quantization.recipes import default_recipe
from quantlab.quantization.stored import round_stored

# (checkpoint, tensor, format, threads) -> (uint8 [rows, row_bytes], relative error)
Method = Callable[[Checkpoint, str, BlockFormat, int | None], tuple[np.ndarray, float]]

_FLOAT_WORDS = tuple(word.lower() for word in DTYPE_BYTES)
METHODS: dict[str, Method] = {"rtn": round_stored}

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
    notes: tuple[str, ...]


def quantize_checkpoint(
    model: str | Path,
    out: Path,
    *,
    format: str = "q4_1",
    uniform: bool = False,
    method: str = "rtn",
    overwrite: bool = False,
    dry_run: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> QuantizeReport:
    """Quantize a float checkpoint into a Hugging Face folder of packed tensors, or into a GGUF file.

    What quantlab quantized earlier may be replaced without `overwrite`; anything else may not.

    Args:
        model: folder, GGUF file or hub id.
        out: folder to make, or GGUF file if it ends in `.gguf`.
        format: the linear weights' format.
        uniform: embedding and head take `format` too, instead of Q8_0.
        method: how codes and scales are chosen; `rtn` rounds to nearest.
        dry_run: report shapes, formats and sizes, and write nothing (errors are None then).
        threads: the most to use; by default one a core.

    Raises:
        InputError: unknown format or method, an unreadable or already quantized model, a tensor with NaN, infinity or
            a scale beyond fp16, an `out` that exists or is the model itself, a full disk.
    """
    started = time.monotonic()
    chosen = format_named(format)
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}; choose one of: {', '.join(METHODS)}")
    checkpoint = open_checkpoint(model)
    if not all(checkpoint.stored_type(name) in _FLOAT_WORDS for name in checkpoint.names):
        raise InputError(f"{checkpoint.path}: is quantized already; start from the original model")
    recipe = default_recipe(checkpoint.family, chosen, uniform)
    notes: tuple[str, ...] = ()
    check_outside(checkpoint, out)
    check_shapes(checkpoint)
    plan = {name: _planned_format(checkpoint, recipe, name) for name in checkpoint.names}
    entries = [_planned_entry(checkpoint, name, format) for name, format in plan.items()]
    total = sum(entry.nbytes for entry in entries)
    reports = [_report(checkpoint, recipe, name, format) for name, format in plan.items()]
    if not dry_run:
        config = _config(checkpoint, recipe, method)
        replaceable = overwrite or _is_own_output(out)
        with open_writer(out, entries, config, companions=checkpoint, replace=replaceable) as writer:
            reports = list(_write_tensors(checkpoint, writer, plan, reports, METHODS[method], threads, progress))
            notes, total = tuple(writer.notes), writer.tensor_bytes
    return QuantizeReport(
        parameters=checkpoint.parameters,
        bytes=total,
        bits_per_weight=8 * total / max(1, checkpoint.parameters),
        source_bytes=checkpoint.nbytes,
        seconds=time.monotonic() - started,
        tensors=tuple(reports),
        notes=notes,
    )


def _is_own_output(out: Path) -> bool:
    """Whether `out` is a folder or file that quantlab quantized earlier, which a new run may replace."""
    try:
        if out.is_file():
            return bool(GgufFile(out).metadata.get("quantlab.method"))
        if not (out / "config.json").is_file():
            return False
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
    method: Method,
    threads: int | None,
    progress: Progress | None,
) -> list[TensorReport]:
    done, written = 0, []
    with _write_behind() as write:
        for (name, format), report in zip(plan.items(), reports, strict=True):
            if progress is not None:
                progress(done, checkpoint.parameters, name)
            if format is None:
                write(writer.copy, name, checkpoint)
                report = replace(report, relative_error=0.0)
            else:
                blocks, error = method(checkpoint, name, format, threads)
                write(writer.write_bytes, name, blocks.reshape(-1), writer.entries[name])
                report = replace(report, relative_error=error)
            written.append(report)
            done += checkpoint.entry(name).elements
    if progress is not None:
        progress(done, checkpoint.parameters, "")
    return written


@contextlib.contextmanager
def _write_behind() -> Iterator[Callable[..., None]]:
    """A function that calls a writer's method while the caller goes on to the next tensor, one at a time."""
    with ThreadPoolExecutor(1) as worker:
        pending: Future[None] | None = None

        def write(method: Callable[..., None], *arguments: Any) -> None:
            nonlocal pending
            if pending is not None:
                pending.result()
            pending = worker.submit(method, *arguments)

        yield write
        if pending is not None:
            pending.result()
