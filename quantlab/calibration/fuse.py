"""Fuse adapters into a model: exactly where the adapter was trained for it, else by quantizing again."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quantlab.adapters.combine import Source, Weighted, weighted_adapters
from quantlab.adapters.fuse import (
    FusedTensor,
    Progress,
    fused_report,
    packed_again,
    write_fused,
)
from quantlab.adapters.fusing import fusion_for, packed_bytes
from quantlab.adapters.reading import check_not_around
from quantlab.adapters.undo import check_can_keep, keep_minimums, write_undone
from quantlab.calibration.calibrated import CalibrationOptions
from quantlab.calibration.quantize import check_method, quantize_checkpoint
from quantlab.checkpoint.checkpoint import Checkpoint
from quantlab.checkpoint.checksums import model_digest
from quantlab.checkpoint.expected_shapes import check_shapes
from quantlab.checkpoint.export import check_beside, packed_config
from quantlab.checkpoint.reader import open_checkpoint
from quantlab.checkpoint.writer import open_writer
from quantlab.errors import InputError
from quantlab.formats import BlockFormat
from quantlab.native import adapters as native_adapters

DEFAULT_METHOD = "search"


@dataclass(frozen=True)
class FuseReport:
    """`exact`: the written model is, to the last byte, the one whose forward pass was trained, or for a float model the
    sum in its own element type. `undo` is the file that `undo=True` needs, if one was kept.
    """

    exact: bool
    tensors: tuple[FusedTensor, ...]
    bytes: int
    seconds: float
    notes: tuple[str, ...]
    undo: str | None = None


def fuse_adapter(
    model: str | Path,
    adapters: Source | Sequence[Source],
    out: str | Path,
    *,
    method: str = DEFAULT_METHOD,
    calibration: CalibrationOptions | None = None,
    overwrite: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> FuseReport:
    """Write `model` with adapters fused into its weights; tensors that no adapter changes keep their bytes.

    Args:
        model: folder, GGUF file or hub id; float or packed.
        adapters: one or several: folder or `Adapter`, each alone or as (that, weight).
        out: folder to make, or GGUF file if it ends in `.gguf`.
        method: how to quantize again the weights that blocks cannot take up exactly; see `quantize_checkpoint`.
        calibration: what that method reads.

    Raises:
        InputError: an adapter for another model, or one whose update the blocks cannot hold; see `quantize_checkpoint`.
    """
    started, out = time.monotonic(), Path(out)
    checkpoint = open_checkpoint(model)
    check_beside(checkpoint, out)
    check_shapes(checkpoint)
    chosen = weighted_adapters(adapters)
    for adapter, _ in chosen:
        check_not_around(adapter.path, out)
    again = packed_again(checkpoint, chosen)
    check_method(method, (_format(checkpoint, name) for name in again))
    if again:
        tensors = _quantized_again(checkpoint, chosen, out, again, method, calibration, overwrite, threads, progress)
        undo = None
    else:
        tensors, undo = _taken_up(checkpoint, chosen, out, overwrite, threads, progress)
    exact, notes = _exactness(checkpoint, chosen, tensors, again)
    size = sum(file.stat().st_size for file in out.rglob("*")) if out.is_dir() else out.stat().st_size
    return FuseReport(
        exact, tuple(tensors), size, time.monotonic() - started, tuple(notes), None if undo is None else str(undo)
    )


def undo_fuse(model: str | Path, adapter: str | Path, out: Path, *, overwrite: bool = False) -> tuple[str, ...]:
    """Write the model as it was before a block-sum adapter was fused into it, byte for byte.

    Returns:
        The names of the weights that changed back.

    Raises:
        InputError: nothing is kept of this model beside the adapter.
    """
    checkpoint = open_checkpoint(model)
    check_beside(checkpoint, out)
    check_not_around(Path(adapter), out)
    return tuple(write_undone(checkpoint, Path(adapter), out, overwrite=overwrite))


def _taken_up(
    checkpoint: Checkpoint,
    chosen: list[Weighted],
    out: Path,
    overwrite: bool,
    threads: int | None,
    progress: Progress | None,
) -> tuple[list[FusedTensor], Path | None]:
    """Write what needs no quantizer; the file to undo with, where minima were replaced."""
    fusion = fusion_for(chosen)
    replaced: dict[str, np.ndarray] = {}
    folder = chosen[0][0].path
    keeps = fusion is not None and fusion.method == "block-sum" and checkpoint.recipe is not None and len(chosen) == 1

    def keep(name: str, format: BlockFormat, blocks: np.ndarray) -> None:
        replaced[name] = native_adapters.minimums(format.name, blocks)

    if keeps:
        check_can_keep(folder)
    tensors = write_fused(
        checkpoint,
        chosen,
        out,
        overwrite=overwrite,
        threads=threads,
        progress=progress,
        keep=keep if keeps else None,
    )
    return tensors, keep_minimums(folder, open_checkpoint(out), replaced) if replaced else None


def _quantized_again(
    checkpoint: Checkpoint,
    chosen: list[Weighted],
    out: Path,
    again: list[str],
    method: str,
    calibration: CalibrationOptions | None,
    overwrite: bool,
    threads: int | None,
    progress: Progress | None,
) -> list[FusedTensor]:
    """By way of a float model beside `out`, in which only the weights named in `again` are quantized."""
    if out.exists() and not overwrite:
        raise InputError(f"{out}: exists already; choose another name or pass --overwrite")
    work = out.with_name(f".{out.name}.fusing")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        floats, packed, recipe = work / "float", work / "packed", work / "recipe.yaml"
        tensors = write_fused(checkpoint, chosen, floats, unpacked=True, threads=threads, progress=progress)
        rules = [f"  - [{name}, {_format(checkpoint, name).name}]\n" for name in again]
        recipe.write_text("rules:\n" + "".join(rules), encoding="utf-8")
        quantize_checkpoint(
            floats,
            packed,
            recipe=str(recipe),
            method=method,
            calibration=calibration,
            threads=threads,
            progress=progress,
        )
        found = _assemble(checkpoint, floats, packed, out, {t.name for t in tensors}, again, method, overwrite, threads)
        return found + [tensor for tensor in tensors if tensor.name not in again]
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _assemble(
    checkpoint: Checkpoint,
    floats: Path,
    packed: Path,
    out: Path,
    adapted: set[str],
    again: list[str],
    method: str,
    overwrite: bool,
    threads: int | None,
) -> list[FusedTensor]:
    """The base's tensors, but for those that the adapters changed."""
    import torch

    from quantlab.checkpoint.tensors import torch_dtype

    wanted, quantized, reports = open_checkpoint(floats), open_checkpoint(packed), []
    entries = [checkpoint.entry(name) for name in checkpoint.names]
    with open_writer(out, entries, packed_config(checkpoint), companions=checkpoint, replace=overwrite) as writer:
        for entry in entries:
            name = entry.name
            if name not in adapted:
                writer.copy(name, checkpoint)
            elif name not in again:
                writer.write(name, wanted.read(name, torch_dtype(entry.dtype)))
            else:
                blocks = packed_bytes(quantized, name)
                writer.write_bytes(name, blocks.reshape(-1), entry)
                target = wanted.read(name, torch.float32).numpy()
                format = _format(checkpoint, name)
                base = packed_bytes(checkpoint, name)
                reports.append(fused_report(name, method, format, base, blocks, _rows_of(target), threads))
    return reports


def _rows_of(target: np.ndarray) -> Callable[[slice, np.ndarray], np.ndarray]:
    return lambda part, _: target[part]


def _format(checkpoint: Checkpoint, name: str) -> BlockFormat:
    format = checkpoint.format(name)
    assert format is not None
    return format


def _exactness(
    checkpoint: Checkpoint, chosen: list[Weighted], tensors: list[FusedTensor], again: list[str]
) -> tuple[bool, list[str]]:
    """Whether what was written is what was trained, and why not."""
    if again:
        worst = max((t for t in tensors if t.name in again), key=lambda t: t.update_error)
        way_out = "; train with --merge-aware or --method block-sum to fuse without loss"
        if any(_format(checkpoint, name).scale_of == "tensor" for name in again):
            way_out = ""  # neither can be had of such blocks
        return False, [
            f"{len(again)} packed weights were quantized again, which took {worst.update_error:.0%} of the update of "
            f"{worst.name}{way_out}"
        ]
    fusion = fusion_for(chosen)
    if fusion is None or checkpoint.recipe is None:
        rounded = [t for t in tensors if t.relative_error > 0]
        notes = [f"{len(rounded)} weights were rounded to {rounded[0].format}"] if rounded else []
        return not rounded, notes
    (adapter, weight), *others = chosen
    if others or weight != 1:
        return False, ["several adapters, or one with a weight, were never trained together"]
    if adapter.training.base != model_digest(checkpoint):
        return False, [f"{adapter.path} was trained on another base than {checkpoint.path}"]
    if adapter.training.device != "cpu":
        return False, [f"{adapter.path} was trained on {adapter.training.device or 'an unknown device'}, not on a CPU"]
    return True, []
