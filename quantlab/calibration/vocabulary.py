"""Embedding and head: the largest matrices of small models, quantized some rows at a time.

An embedding's rows are looked up, so its columns count alike; a head multiplies the final norm's outputs, whose second
moment weighs its errors. A tied matrix is both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from quantlab import native
from quantlab.calibration.work_folder import FinishedTensor
from quantlab.checkpoint import Checkpoint
from quantlab.checkpoint.tensors import to_fp32
from quantlab.errors import InputError
from quantlab.formats import BlockFormat
from quantlab.formats.blocks import BLOCK_SIZE
from quantlab.quantization.statistics import InputStatistics
from quantlab.quantization.workers import one_thread_each

if TYPE_CHECKING:
    from quantlab.calibration.blockwise import CalibratedMethod

PART = 1 << 25  # weights quantized at a time: 128 MB of fp32
TIED_IDENTITY = 1.0  # what a tied matrix' use as an embedding weighs beside its use as a head


def embedding_rows(checkpoint: Checkpoint, ids: np.ndarray) -> torch.Tensor:
    """Rows `ids` (ascending) of the embedding, packed or not, float32 [ids, width]; the whole table is never in memory.

    Raises:
        InputError: the table has no such row: the tokenizer belongs to another model.
    """
    name = checkpoint.family.embedding
    entry, format = checkpoint.entry(name), checkpoint.format(name)
    if len(ids) and int(ids[-1]) >= entry.shape[0]:
        raise InputError(
            f"{checkpoint.path}: the tokenizer gives token {int(ids[-1])}, and the embedding has {entry.shape[0]} rows"
        )
    out = np.empty((len(ids), checkpoint.shape(name)[1]), np.float32)
    for start, part in checkpoint.read_rows(name):
        wanted = slice(*np.searchsorted(ids, [start, start + len(part)]))
        chosen = np.ascontiguousarray(part[ids[wanted] - start])
        if not len(chosen):
            continue
        if format is not None:
            out[wanted] = native.dequantize(format.name, chosen)
        else:
            out[wanted] = to_fp32(chosen.reshape(-1), entry.dtype).reshape(-1, entry.shape[1])
    return torch.from_numpy(out)


def quantize_vocabulary(
    checkpoint: Checkpoint,
    plan: Mapping[str, BlockFormat | None],
    method: CalibratedMethod,
    head: InputStatistics | None,
) -> Iterator[FinishedTensor]:
    """Quantize what `plan` gives a format outside the blocks; `head` are the statistics of the head's inputs."""
    for name in checkpoint.names:
        format = plan[name]
        if format is not None and not in_blocks(checkpoint, name):
            is_head = name == head_name(checkpoint)
            yield quantize_tensor(checkpoint, name, format, method, head if is_head else None)


def head_name(checkpoint: Checkpoint) -> str:
    """The matrix that the final norm's outputs are multiplied by."""
    return checkpoint.family.embedding if checkpoint.tied else checkpoint.family.head


def in_blocks(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a tensor belongs to a transformer block."""
    return name.startswith(checkpoint.family.linear[0].partition(".*.")[0] + ".")


def quantize_tensor(
    checkpoint: Checkpoint,
    name: str,
    format: BlockFormat,
    method: CalibratedMethod,
    statistics: InputStatistics | None,
) -> FinishedTensor:
    """Quantize any tensor of a checkpoint, some rows at a time: they are independent, so parts give the whole's bytes.

    Without statistics it is searched with equal weights. Outside the blocks all of the format's levels are used.
    """
    if not in_blocks(checkpoint, name):
        method = replace(method, levels=None)
    if statistics is None:
        method = replace(method, name="search", options={})
    elif checkpoint.tied and name == head_name(checkpoint):
        statistics = _as_both(statistics)
    rows, columns = checkpoint.shape(name)
    weight = checkpoint.read(name)
    step = max(1, PART // columns)
    if rows <= step:
        return method.quantize(name, weight.to(torch.float32), format, statistics)
    parts, totals = [], _Totals()
    for start in range(0, rows, step):
        part = weight[start : start + step].to(torch.float32)
        finished = method.quantize(name, part, format, statistics)
        totals.add(part, finished, method.used(statistics))
        parts.append(finished)
    blocks = torch.cat([part.blocks for part in parts])
    note = next((part.note for part in parts if part.note), None)
    return FinishedTensor(name, blocks, totals.relative_error, totals.weighted_error, note)


def _as_both(head: InputStatistics) -> InputStatistics:
    """For a matrix that is the embedding too: the identity added, as heavy as the head's inputs."""
    with one_thread_each():
        share = float(head.diagonal.mean()) * TIED_IDENTITY
    if head.second_moment is None and head.tiles is not None:
        return InputStatistics.of_tiles(head.tokens, head.tiles + share * torch.eye(BLOCK_SIZE))
    if head.second_moment is None:
        return InputStatistics(head.tokens, head.diagonal + share)
    identity = torch.eye(head.columns) * share
    return InputStatistics.of_second_moment(head.tokens, head.second_moment + identity)


@dataclass
class _Totals:
    """Errors of parts, put together as those of the whole."""

    error: float = 0.0
    total: float = 0.0
    weighted: float = 0.0
    weighted_total: float = 0.0

    def add(self, weight: torch.Tensor, part: FinishedTensor, statistics: InputStatistics | None) -> None:
        with one_thread_each():
            norm, weighted_norm = _norms(weight, statistics)
        self.error += part.relative_error**2 * norm
        self.total += norm
        self.weighted += part.weighted_error * weighted_norm
        self.weighted_total += weighted_norm

    @property
    def relative_error(self) -> float:
        return (self.error / self.total) ** 0.5 if self.total else 0.0

    @property
    def weighted_error(self) -> float:
        return self.weighted / self.weighted_total if self.weighted_total else 0.0


def _norms(weight: torch.Tensor, statistics: InputStatistics | None) -> tuple[float, float]:
    """|W|^2 and tr(W H W^T), as `QuantizedWeight` has them."""
    norm = float(weight.square().sum(dtype=torch.float64))
    if statistics is None:
        return norm, norm
    if statistics.second_moment is None and statistics.tiles is not None:
        parts = weight.reshape(len(weight), -1, BLOCK_SIZE).transpose(0, 1)  # [blocks, rows, 32]
        return norm, float(((parts @ statistics.tiles) * parts).sum(dtype=torch.float64))
    if statistics.second_moment is None:
        return norm, float((weight.square().sum(dim=0, dtype=torch.float64) * statistics.diagonal).sum())
    product = weight @ statistics.second_moment
    return norm, float((product * weight).sum(dtype=torch.float64))
