"""Which adapters an engine applies, and how strongly: checked, and put into blocks or stacked into pairs of factors."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from quantlab.adapters.adapter import Adapter, check_fits
from quantlab.adapters.combine import Source, Weighted, combined_pairs, folded_pairs, weighted_adapters
from quantlab.adapters.fusing import fused_tensor, fusion_for, packed_bytes
from quantlab.checkpoint import Checkpoint
from quantlab.errors import InputError

logger = logging.getLogger(__name__)


def choose_adapters(given: Sequence[Source], checkpoint: Checkpoint) -> tuple[Weighted, ...]:
    """Read and check adapters for a model; those of weight 0 are left out.

    Args:
        given: adapters or their folders, each alone (weight 1) or as (adapter, weight).

    Raises:
        InputError: an adapter that cannot be read, was made for another model, or that engines do not compute, or a
            weight that is no finite number.
    """
    if isinstance(given, (str, Path, Adapter)):
        raise InputError("adapters: a list is expected, of adapters, folders, or pairs of one and its weight")
    chosen = weighted_adapters(given)
    for adapter, _ in chosen:
        _check(adapter, checkpoint)
    applied = tuple((adapter, weight) for adapter, weight in chosen if weight)
    _tell_of_mixtures(applied, checkpoint)
    return applied


def _tell_of_mixtures(applied: Sequence[Weighted], checkpoint: Checkpoint) -> None:
    for adapter, _ in applied:
        if adapter.method == "merge-aware" and (fusion_for(applied) is None or checkpoint.recipe is None):
            logger.warning("%s: was trained for fused weights; beside them its results differ a little", adapter.path)


def _check(adapter: Adapter, checkpoint: Checkpoint) -> None:
    family = checkpoint.family
    beyond = [name for name in adapter.pairs if name in (family.embedding, family.head)]
    if beyond:
        raise InputError(
            f"{adapter.path}: adapts {beyond[0]}; engines apply adapters to the layers' linear weights alone: "
            "fuse it into the model and run that"
        )
    check_fits(adapter, checkpoint)
    others = [name for name in adapter.pairs if not any(fnmatchcase(name, pattern) for pattern in family.linear)]
    if others:
        raise InputError(f"{adapter.path}: adapts {others[0]}, which is no linear weight of the layers")
    if adapter.has_magnitudes:
        raise InputError(
            f"{adapter.path}: a DoRA adapter rescales the rows of the weights themselves, which engines do not do "
            "beside them: fuse it into the model and run that"
        )


def fused_weights(
    chosen: Sequence[Weighted], checkpoint: Checkpoint, threads: int | None = None
) -> dict[str, np.ndarray]:
    """The packed weights that take the adapters up, with the updates in their blocks: uint8 [out, row_bytes] by name.

    Adapters that were trained so (block-sum, merge-aware) are applied as `fuse` writes them, bit for bit; none of the
    others is, nor any beside another kind.

    Raises:
        InputError: blocks that cannot hold an update.
    """
    fusion = fusion_for(chosen)
    if fusion is None:
        return {}
    pairs = {name: pair for name, pair in combined_pairs(chosen).items() if checkpoint.format(name) is not None}
    return {
        name: fused_tensor(checkpoint, name, packed_bytes(checkpoint, name), pair, fusion, threads=threads)
        for name, pair in pairs.items()
    }


def stacked_factors(chosen: Iterable[Weighted], fused: Collection[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """All updates of each weight as one: float32 (A [rank, in], B [out, rank]), scales and weights in B; without those
    of the weights that are `fused`.
    """
    return {name: (pair.a, pair.b) for name, pair in folded_pairs(chosen).items() if name not in fused}


def fingerprint_of(chosen: Iterable[Weighted]) -> str:
    """A hash of what the adapters do together; empty for none."""
    told = "".join(f"{adapter.fingerprint()} {weight!r}\n" for adapter, weight in chosen)
    return hashlib.sha256(told.encode()).hexdigest()[:16] if told else ""
