"""Fuse adapters into a checkpoint's files, one tensor at a time; no model object is needed.

Float weights take W + scale * b a in fp32 and go back to their element type. Packed weights take what `fusing`
describes, where the adapter was trained for that. What else has to be packed again is `calibration.fuse`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quantlab import native
from quantlab.adapters.adapter import LowRankPair, check_fits
from quantlab.adapters.combine import Weighted, combined_pairs
from quantlab.adapters.fusing import Fusion, fused_tensor, fusion_for, packed_bytes
from quantlab.checkpoint.checkpoint import Checkpoint
from quantlab.checkpoint.export import packed_config
from quantlab.checkpoint.tensors import FLOAT_DTYPES, TensorEntry, to_fp32
from quantlab.checkpoint.writer import CheckpointWriter, open_writer
from quantlab.errors import InputError
from quantlab.formats import BlockFormat
from quantlab.native import adapters as native_adapters

TILE_WEIGHTS = 1 << 22  # of the rows that are held in fp32 at a time

Progress = Callable[[int, int, str], None]  # (weights done, weights in all, the tensor at hand)


@dataclass(frozen=True)
class FusedTensor:
    """What became of one adapted weight.

    Attributes:
        how: "float", "minimums" (block-sum), "codes" or "codes and scales" (merge-aware), or the method that packed it
            again.
        relative_error: Frobenius norm of (written weight - (W + update)), over that of W + update.
        update_error: the same over the norm of the update: the share of the adapter that rounding took, and more than 1
            where rounding is coarser than the adapter.
    """

    name: str
    how: str
    format: str
    relative_error: float
    update_error: float


def packed_again(checkpoint: Checkpoint, adapters: Sequence[Weighted]) -> list[str]:
    """The adapted weights that blocks cannot take up as they are; checks that the adapters fit.

    Raises:
        InputError: an adapter for another model; one with block-sum updates for blocks without a minimum.
    """
    for adapter, _ in adapters:
        check_fits(adapter, checkpoint)
    fusion = fusion_for(adapters)
    packed = [name for adapter, _ in adapters for name in adapter.pairs if checkpoint.format(name) is not None]
    if fusion is None:
        return sorted(set(packed))
    for name in packed:
        format = checkpoint.format(name)
        assert format is not None
        fusion.check_format(format, f"{checkpoint.path}: {name}")
    return []


def write_fused(
    checkpoint: Checkpoint,
    adapters: Sequence[Weighted],
    out: Path,
    *,
    overwrite: bool = False,
    unpacked: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    keep: Callable[[str, BlockFormat, np.ndarray], None] | None = None,
) -> list[FusedTensor]:
    """Write the checkpoint with the adapters fused into it; all other tensors are copied byte for byte.

    Args:
        out: folder, or GGUF file.
        unpacked: write a float model (fp32), whatever the base is.
        keep: is called with name, format and blocks of every packed weight before it changes.

    Raises:
        InputError: `out` exists or cannot be written; an update that makes a weight infinite.
    """
    pairs, fusion = combined_pairs(adapters), fusion_for(adapters)
    entries = [_entry(checkpoint, name, unpacked) for name in checkpoint.names]
    config = packed_config(checkpoint)
    if unpacked:
        config = {key: value for key, value in config.items() if key != "quantization_config"}
    reports, done = [], 0
    with open_writer(out, entries, config, companions=checkpoint, replace=overwrite) as writer:
        for entry in entries:
            name, format = entry.name, checkpoint.format(entry.name)
            if progress is not None:
                progress(done, checkpoint.parameters, name)
            done += math.prod(checkpoint.shape(name))
            if name not in pairs:
                _copy(writer, checkpoint, entry, threads)
            elif format is None or unpacked:
                reports.append(_write_float(writer, checkpoint, entry, pairs[name], threads))
            else:
                assert fusion is not None, f"{name}: to be packed again"
                blocks = packed_bytes(checkpoint, name)
                if keep is not None:
                    keep(name, format, blocks)
                reports.append(_write_blocks(writer, checkpoint, entry, blocks, pairs[name], fusion, threads))
    return reports


def _entry(checkpoint: Checkpoint, name: str, unpacked: bool) -> TensorEntry:
    entry = checkpoint.entry(name)
    return (
        TensorEntry(name, "F32", checkpoint.shape(name)) if unpacked and entry.dtype in (*FLOAT_DTYPES, "U8") else entry
    )


def _copy(writer: CheckpointWriter, checkpoint: Checkpoint, entry: TensorEntry, threads: int | None) -> None:
    if checkpoint.entry(entry.name) == entry:
        writer.copy(entry.name, checkpoint)
    else:
        writer.write_bytes(entry.name, _bytes(_weights(checkpoint, entry.name, threads)), entry)


def _write_float(
    writer: CheckpointWriter, checkpoint: Checkpoint, entry: TensorEntry, pair: LowRankPair, threads: int | None
) -> FusedTensor:
    original = _weights(checkpoint, entry.name, threads)
    update = native_adapters.low_rank_product(pair.a, pair.b, pair.scale, threads=threads)
    size = _norm(update)
    wanted = np.add(original, update, out=update)
    if pair.magnitude is not None:
        lengths = np.sqrt(np.einsum("ij,ij->i", wanted, wanted, dtype=np.float64))
        wanted *= (pair.magnitude / lengths).astype(np.float32)[:, None]
        size = _norm(wanted - original)
    if not np.isfinite(wanted).all():
        raise InputError(
            f"{entry.name}: the fused weights hold NaN or infinity; the adapter does not belong to this model"
        )
    stored, rounded = _as_type(wanted, entry.dtype)
    if not np.isfinite(rounded).all():
        raise InputError(f"{entry.name}: the fused weights are beyond {entry.dtype}; fuse into a float32 model")
    writer.write_bytes(entry.name, stored, entry)
    return _report(entry.name, "float", entry.dtype.lower(), _norm(rounded - wanted), _norm(wanted), size)


def _write_blocks(
    writer: CheckpointWriter,
    checkpoint: Checkpoint,
    entry: TensorEntry,
    blocks: np.ndarray,
    pair: LowRankPair,
    fusion: Fusion,
    threads: int | None,
) -> FusedTensor:
    format = checkpoint.format(entry.name)
    assert format is not None
    fused = fused_tensor(checkpoint, entry.name, blocks, pair, fusion, threads=threads)
    writer.write_bytes(entry.name, fused.reshape(-1), entry)
    how = {"block-sum": "minimums", "merge-aware": "codes and scales" if fusion.regrid else "codes"}[fusion.method]

    def wanted(part: slice, before: np.ndarray) -> np.ndarray:
        rows = np.ascontiguousarray(pair.b[part])
        return before + native_adapters.low_rank_product(pair.a, rows, pair.scale, threads=threads)

    return fused_report(entry.name, how, format, blocks, fused, wanted, threads)


def fused_report(
    name: str,
    how: str,
    format: BlockFormat,
    blocks: np.ndarray,
    fused: np.ndarray,
    wanted_rows: Callable[[slice, np.ndarray], np.ndarray],
    threads: int | None,
) -> FusedTensor:
    """How far `fused` is from what was wanted; both it and the base's `blocks` are uint8 [out, row_bytes].

    Args:
        wanted_rows: from some rows and the base's weights there, fp32, to the fused weights before rounding.
    """
    sums = np.zeros(3)  # of squares: the error, the wanted weights, the update
    height = max(1, TILE_WEIGHTS // format.columns(blocks.shape[1]))
    for start in range(0, len(blocks), height):
        part = slice(start, start + height)
        before = native.dequantize(format.name, np.ascontiguousarray(blocks[part]), threads=threads)
        after = native.dequantize(format.name, np.ascontiguousarray(fused[part]), threads=threads)
        wanted = wanted_rows(part, before)
        sums += [_squares(after - wanted), _squares(wanted), _squares(wanted - before)]
    return _report(name, how, format.name, *np.sqrt(sums).tolist())


def _report(name: str, how: str, format: str, error: float, wanted: float, update: float) -> FusedTensor:
    return FusedTensor(
        name, how, format, error / wanted if wanted else 0.0, error / update if update else (0.0 if not error else 1.0)
    )


def _weights(checkpoint: Checkpoint, name: str, threads: int | None) -> np.ndarray:
    """fp32, a fresh array of the weights' shape."""
    format, raw = checkpoint.format(name), checkpoint.read_bytes(name)
    if format is None:
        return np.array(to_fp32(raw, checkpoint.entry(name).dtype)).reshape(checkpoint.shape(name))
    return native.dequantize(format.name, raw.reshape(checkpoint.entry(name).shape), threads=threads)


def _as_type(weights: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of fp32 weights in another element type, uint8 [nbytes], and the values that those stand for."""
    if dtype == "BF16":
        import torch

        half = torch.from_numpy(weights).to(torch.bfloat16)
        return half.reshape(-1).view(torch.uint8).numpy(), half.float().numpy()
    with np.errstate(over="ignore"):
        cast = weights.astype({"F64": np.float64, "F32": np.float32, "F16": np.float16}[dtype])
    return _bytes(cast), cast.astype(np.float32)


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _squares(array: np.ndarray) -> float:
    return float(np.einsum("ij,ij->", array, array, dtype=np.float64))


def _norm(array: np.ndarray) -> float:
    return math.sqrt(_squares(array))
