"""Is this model what it says it is? Structure, numbers, checksums, and every block derived again from the source."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quantlab.checkpoint import Checkpoint, open_checkpoint
from quantlab.checkpoint.checksums import recorded_checksums, stored_checksum
from quantlab.checkpoint.tensors import FLOAT_DTYPES, first_nonfinite, to_fp32
from quantlab.errors import InputError
from quantlab.formats import BlockFormat
from quantlab.quantization.stored import round_stored

Progress = Callable[[int, int, str], None]  # (bytes done, bytes in all, the tensor at hand)
FAR = 0.8  # relative error: two levels leave less of a tensor's own values, another tensor's are beyond 1
MOST_FAULTS = 16  # listed of one tensor; the problem of the last tells how many more there are


@dataclass(frozen=True)
class Fault:
    """`tensor` is None where the whole model is concerned; `block` counts a tensor's blocks row by row from 0."""

    tensor: str | None
    block: int | None
    problem: str


@dataclass(frozen=True)
class VerifyReport:
    """`checks` tells what was compared; what a file does not record cannot be."""

    ok: bool
    faults: tuple[Fault, ...]
    checks: tuple[str, ...]
    tensors: int
    bytes: int


def verify_checkpoint(
    model: str | Path, source: str | Path | None = None, *, progress: Progress | None = None
) -> VerifyReport:
    """Check a model's files; with `source`, also that each tensor is the source's, rounded to nearest where packed, or
    near it where a calibrated method chose the blocks.

    Args:
        model: folder, GGUF file or hub id.
        source: the float model that it was quantized or exported from.

    Raises:
        InputError: `model` does not exist, or `source` cannot be read, is quantized, or is another model.
    """
    from quantlab.checkpoint.source import local_model

    path = local_model(model)
    original = None if source is None else open_checkpoint(source)
    try:
        checkpoint = open_checkpoint(path)
    except InputError as error:
        return VerifyReport(False, (Fault(None, None, str(error)),), ("structure",), 0, 0)
    checks = ["structure", "numbers"]
    faults = [Fault(name, None, problem) for name, problem in _structure_faults(checkpoint)]
    if original is not None:
        _check_source(checkpoint, original)
        checks.append("source")
    try:
        recorded = recorded_checksums(checkpoint)
    except InputError as error:
        recorded = {}
        faults.append(Fault(None, None, str(error)))
    if recorded:
        checks.append("checksums")
    for stored_name in recorded:
        if stored_checksum(checkpoint, stored_name) != recorded[stored_name]:
            name = checkpoint.full_name(stored_name)
            faults.append(Fault(name, None, "its bytes are not those whose checksum was recorded"))
    done = 0
    for name in checkpoint.names:
        if progress is not None:
            progress(done, checkpoint.nbytes, name)
        faults.extend(_tensor_faults(checkpoint, name, original))
        done += checkpoint.stored_bytes(name)
    return VerifyReport(not faults, tuple(faults), tuple(checks), len(checkpoint.names), checkpoint.nbytes)


def _structure_faults(checkpoint: Checkpoint) -> Iterator[tuple[str | None, str]]:
    from quantlab.loading import tensor_faults

    try:
        yield from tensor_faults(checkpoint)
    except InputError as error:
        yield None, str(error)


def _check_source(checkpoint: Checkpoint, original: Checkpoint) -> None:
    if original.recipe is not None:
        raise InputError(f"{original.path}: is quantized itself; --source wants the float model")
    if original.family.gguf.architecture != checkpoint.family.gguf.architecture:
        raise InputError(
            f"{original.path}: is a {original.family.model_type} model, and {checkpoint.path} is a "
            f"{checkpoint.family.model_type} model; give the one that it was made from"
        )


def _tensor_faults(checkpoint: Checkpoint, name: str, original: Checkpoint | None) -> Iterator[Fault]:
    data = checkpoint.read_bytes(name)
    format = checkpoint.format(name)
    yield from _number_faults(checkpoint, name, data, format)
    if original is not None:
        yield from _source_faults(checkpoint, name, data, format, original)


def _number_faults(checkpoint: Checkpoint, name: str, data: np.ndarray, format: BlockFormat | None) -> Iterator[Fault]:
    entry = checkpoint.entry(name)
    if format is None:
        place = first_nonfinite(data, entry.dtype) if entry.dtype in FLOAT_DTYPES else None
        if place is not None:
            yield Fault(name, None, f"element {place} is NaN or infinite")
        return
    blocks = data.reshape(-1, format.block_bytes)
    scales = np.ascontiguousarray(blocks[:, format.scale_bytes]).view("<f2")
    bad = np.flatnonzero(~np.isfinite(scales).all(axis=1))
    yield from _listed(name, bad, "its scale is NaN or infinite")


def _source_faults(
    checkpoint: Checkpoint, name: str, data: np.ndarray, format: BlockFormat | None, original: Checkpoint
) -> Iterator[Fault]:
    if name not in original.names:
        yield Fault(name, None, f"{original.path} has no such tensor")
    elif original.shape(name) != checkpoint.shape(name):
        shapes = f"{list(checkpoint.shape(name))}, in the source {list(original.shape(name))}"
        yield Fault(name, None, f"its shape is {shapes}")
    elif format is None:
        ours, theirs = _values(checkpoint, name), _values(original, name)
        differing = np.flatnonzero(ours != theirs)
        if differing.size:
            first = f"element {differing[0]} is {ours[differing[0]]:g}, in the source {theirs[differing[0]]:g}"
            yield Fault(name, None, f"{differing.size} elements differ from the source: {first}")
    elif _is_calibrated(checkpoint):
        error = _relative_error(checkpoint, name, original)
        if error > FAR:
            yield Fault(name, None, f"is not the source's tensor quantized: its relative error is {error:.2f}")
    else:
        expected = round_stored(original, name, format)[0].reshape(-1, format.block_bytes)
        differing = np.flatnonzero((expected != data.reshape(expected.shape)).any(axis=1))
        yield from _listed(name, differing, "is not what rounding the source to nearest gives")


def _is_calibrated(checkpoint: Checkpoint) -> bool:
    """Whether blocks depend on more than the source, so that they cannot be derived again."""
    made = checkpoint.sidecar("quantization") or checkpoint.config.get("quantization_config") or {}
    return made.get("method", "rtn") != "rtn"


def _relative_error(checkpoint: Checkpoint, name: str, original: Checkpoint) -> float:
    from quantlab.quantization.rtn import relative_error

    return relative_error(original.read(name), checkpoint.read_packed(name))


def _values(checkpoint: Checkpoint, name: str) -> np.ndarray:
    entry = checkpoint.entry(name)
    return to_fp32(checkpoint.read_bytes(name), entry.dtype)


def _listed(name: str, blocks: np.ndarray, problem: str) -> Iterator[Fault]:
    for position, block in enumerate(blocks[:MOST_FAULTS]):
        more = blocks.size - MOST_FAULTS if position == MOST_FAULTS - 1 else 0
        yield Fault(name, int(block), f"{problem} (and {more} more blocks)" if more > 0 else problem)
