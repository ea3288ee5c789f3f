"""From one kind of file to the other without touching a value: Hugging Face folder <-> GGUF, float or packed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quantlab.checkpoint.checkpoint import Checkpoint
from quantlab.checkpoint.expected_shapes import check_shapes
from quantlab.checkpoint.gguf_checkpoint import GgufCheckpoint
from quantlab.checkpoint.reader import open_checkpoint
from quantlab.checkpoint.tensors import TensorEntry, to_fp32
from quantlab.checkpoint.writer import CheckpointWriter, open_writer
from quantlab.errors import InputError

KINDS = ("gguf", "hf")
SIDECARS = ("calibration",)
_HALF_TYPES = {"float16": "F16", "bfloat16": "BF16"}  # config.json's word -> safetensors'

Progress = Callable[[int, int, str], None]  # (bytes done, bytes in all, the tensor at hand)


@dataclass(frozen=True)
class ExportReport:
    """`bytes` counts what was written, tokenizer and all. `tensors_changed` of the tensors hold other values than
    before (by name in `changed`); it was lossless if none does.
    """

    bytes: int
    lossless: bool
    tensors_changed: int
    changed: tuple[str, ...]
    tensors: int
    notes: tuple[str, ...]
    seconds: float


def export_checkpoint(
    model: str | Path, out: Path, to: str, *, overwrite: bool = False, progress: Progress | None = None
) -> ExportReport:
    """Write a model as a GGUF file (`to="gguf"`) or as a Hugging Face folder (`to="hf"`); blocks stay as they are.

    Args:
        model: folder, GGUF file or hub id.
        out: file or folder to make; a GGUF file's name must end in `.gguf`.
        overwrite: whether an existing `out` may be replaced.

    Raises:
        InputError: the model cannot be read, `out` exists, or the other kind of file cannot hold the model.
    """
    started = time.monotonic()
    if to not in KINDS:
        raise InputError(f"--to {to}: choose one of: {', '.join(KINDS)}")
    if (out.suffix == ".gguf") != (to == "gguf"):
        raise InputError(
            f"{out}: a GGUF file's name ends in .gguf, and a folder's does not; give the one that --to names"
        )
    checkpoint = open_checkpoint(model)
    check_outside(checkpoint, out)
    check_shapes(checkpoint)
    entries = {name: _planned_entry(checkpoint, name) for name in checkpoint.names}
    kept = {name: checkpoint.sidecar(name) for name in SIDECARS}
    with open_writer(
        out,
        tuple(entries.values()),
        packed_config(checkpoint),
        companions=checkpoint,
        replace=overwrite,
        sidecars={name: content for name, content in kept.items() if content is not None},
    ) as writer:
        _copy_tensors(checkpoint, writer, progress)
    size = sum(file.stat().st_size for file in out.rglob("*")) if out.is_dir() else out.stat().st_size
    return ExportReport(
        bytes=size,
        lossless=not writer.changed,
        tensors_changed=len(writer.changed),
        changed=tuple(writer.changed),
        tensors=len(entries),
        notes=tuple(writer.notes),
        seconds=time.monotonic() - started,
    )


def check_outside(checkpoint: Checkpoint, out: Path) -> None:
    """Refuse a destination that is the model itself, or holds it.

    Raises:
        InputError: it does.
    """
    if out.exists() and checkpoint.path.resolve().is_relative_to(out.resolve()):
        raise InputError(f"{out}: is the model itself, or a folder around it; choose another name")


def check_beside(checkpoint: Checkpoint, out: Path) -> None:
    """Like `check_outside`, and refuse a destination within the model's folder too: its files are not to change.

    Raises:
        InputError: it is the model, around it, or in it.
    """
    check_outside(checkpoint, out)
    folder = checkpoint.path.resolve()
    if folder.is_dir() and out.resolve().is_relative_to(folder):
        raise InputError(f"{out}: lies in the model's folder {checkpoint.path}; choose another place")


def packed_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """config.json with the recipe of a packed checkpoint, which a GGUF file keeps in its tensor list."""
    config = {**checkpoint.config, "tie_word_embeddings": checkpoint.tied}
    if checkpoint.recipe is not None and "quantization_config" not in config:
        made = checkpoint.sidecar("quantization") or {}  # how, as the writer of a GGUF file recorded it
        config["quantization_config"] = {**made, **checkpoint.recipe.to_config()}
    return config


def _copy_tensors(checkpoint: Checkpoint, writer: CheckpointWriter, progress: Progress | None) -> None:
    done = 0
    for name in checkpoint.names:
        if progress is not None:
            progress(done, checkpoint.nbytes, name)
        planned = writer.entries[name]
        if planned == checkpoint.entry(name):
            writer.copy(name, checkpoint)
        else:
            narrowed = _narrow(to_fp32(checkpoint.read_bytes(name), "F32"), planned.dtype)
            assert narrowed is not None, f"{name}: was narrowed without loss a moment ago"
            writer.write_bytes(name, narrowed, planned)
        done += checkpoint.stored_bytes(name)
    if progress is not None:
        progress(done, checkpoint.nbytes, "")


def _planned_entry(checkpoint: Checkpoint, name: str) -> TensorEntry:
    """The tensor as it is; but GGUF's fp32 vectors in the model's own half type where that holds them exactly."""
    entry = checkpoint.entry(name)
    half = _HALF_TYPES.get(str(checkpoint.config.get("dtype", checkpoint.config.get("torch_dtype"))))
    may_be_widened = isinstance(checkpoint, GgufCheckpoint) and checkpoint.stored_type(name) == "f32"
    if half is None or not may_be_widened or not checkpoint.family.gguf_wants_fp32(name, len(entry.shape)):
        return entry
    narrowed = _narrow(to_fp32(checkpoint.read_bytes(name), "F32"), half)
    return entry if narrowed is None else TensorEntry(name, half, entry.shape)


def _narrow(values: np.ndarray, dtype: str) -> np.ndarray | None:
    """The bytes of fp32 values in a half type; None where it cannot hold one of them exactly."""
    if dtype == "BF16":
        bits = values.view(np.uint32)
        return None if (bits & 0xFFFF).any() else (bits >> 16).astype("<u2").view(np.uint8)
    with np.errstate(over="ignore"):
        halves = values.astype("<f2")
    return halves.view(np.uint8) if np.array_equal(halves.astype(np.float32), values) else None
