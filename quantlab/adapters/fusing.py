"""An adapter's update brought into blocks: the one arithmetic that training sees and `fuse` writes.

Two kinds fuse without loss, because their training's forward pass computes with the very bytes that fusing writes:

- block-sum: `a` is constant along each block, so the update of a block is one number, which its minimum takes up:
  m <- fp16(m + scale * (b a)). Codes and d stay (QA-LoRA, Xu et al. 2023, arXiv 2309.14717, on ggml's blocks).
- merge-aware: each block keeps its d and m, and the codes are chosen anew for W + scale * b a; with `regrid` d and m
  are computed anew too, as `rtn` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from quantlab import native
from quantlab.adapters.adapter import LowRankPair
from quantlab.adapters.combine import Weighted
from quantlab.checkpoint.checkpoint import Checkpoint
from quantlab.errors import InputError
from quantlab.formats.blocks import BLOCK_SIZE, BlockFormat, check_own_scales
from quantlab.native import adapters as native_adapters

TILE_WEIGHTS = 1 << 22  # of the rows that `regrid` holds in fp32 at a time


@dataclass(frozen=True)
class Fusion:
    """How updates enter blocks: "block-sum" or "merge-aware"; see `Training` for the other two."""

    method: str
    regrid: bool = False
    levels: int | None = None

    def check_format(self, format: BlockFormat, name: str) -> None:
        """Refuse blocks that cannot take such an update.

        Raises:
            InputError: a block-sum update needs blocks with a minimum, a merge-aware one scales of each block's own.
        """
        if self.method == "block-sum" and not format.has_minimum:
            raise InputError(
                f"{name}: {format.name} blocks have no minimum that could take up a block-sum update; "
                f"quantize the base to q4_1 or q5_1{'' if format.scale_of == 'tensor' else ', or use --merge-aware'}"
            )
        check_own_scales(format, f"{name}: --merge-aware", "train a plain LoRA, or quantize the base to q4_1 or q5_1")


def fused_blocks(
    format: BlockFormat,
    blocks: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    scale: float,
    fusion: Fusion,
    *,
    threads: int | None = None,
) -> np.ndarray:
    """Blocks of the weights plus `scale * b @ a`; the same bytes for any number of threads.

    Args:
        blocks: uint8 [out, row_bytes].
        a: float32 [rank, in]; with block-sum [rank, in / 32], a number a block.
        b: float32 [out, rank].

    Raises:
        ValueError: shapes that do not fit, or an update that fp16 or fp32 cannot hold; the message tells where.
    """
    if fusion.method == "block-sum":
        return native_adapters.shift_minimums(format.name, blocks, a, b, scale, threads=threads)
    if fusion.regrid:
        return _regridded(format.with_levels(fusion.levels), blocks, a, b, scale, threads)
    return native_adapters.rechoose_codes(format.name, blocks, a, b, scale, levels=fusion.levels, threads=threads)


def _regridded(
    format: BlockFormat, blocks: np.ndarray, a: np.ndarray, b: np.ndarray, scale: float, threads: int | None
) -> np.ndarray:
    result = np.empty_like(blocks)
    rows = max(1, TILE_WEIGHTS // a.shape[1])
    for start in range(0, len(blocks), rows):
        part = slice(start, start + rows)
        weights = native.dequantize(format.name, blocks[part], threads=threads)
        weights += native_adapters.low_rank_product(a, np.ascontiguousarray(b[part]), scale, threads=threads)
        native.quantize(format.name, weights, format.levels, threads=threads, out=result[part])
    return result


def block_factors(a: np.ndarray) -> np.ndarray:
    """Of a block-sum adapter's `a` [rank, in], a number a block: [rank, in / 32]."""
    return np.ascontiguousarray(a[:, ::BLOCK_SIZE])


def fusion_for(adapters: Sequence[Weighted]) -> Fusion | None:
    """How the blocks of a packed base take these adapters up; None if they were not trained for it."""
    kinds = {(adapter.method, adapter.training.regrid, adapter.training.levels) for adapter, _ in adapters}
    if len(kinds) != 1:
        return None
    method, regrid, levels = kinds.pop()
    return None if method == "lora" else Fusion(method, regrid, levels)


def fused_tensor(
    checkpoint: Checkpoint,
    name: str,
    blocks: np.ndarray,
    pair: LowRankPair,
    fusion: Fusion,
    *,
    threads: int | None = None,
) -> np.ndarray:
    """The `packed_bytes` of a weight with an update in them, uint8 [out, row_bytes].

    Raises:
        InputError: an update that the blocks cannot hold.
    """
    format = checkpoint.format(name)
    assert format is not None, f"{name}: is not packed"
    fusion.check_format(format, f"{checkpoint.path}: {name}")
    a = block_factors(pair.a) if fusion.method == "block-sum" else pair.a
    try:
        return fused_blocks(format, blocks, a, pair.b, pair.scale, fusion, threads=threads)
    except ValueError as error:
        raise InputError(f"{checkpoint.path}: {name}: {error}") from None


def packed_bytes(checkpoint: Checkpoint, name: str) -> np.ndarray:
    """The blocks of a packed tensor, uint8 [out, row_bytes]."""
    return checkpoint.read_bytes(name).reshape(checkpoint.entry(name).shape)
