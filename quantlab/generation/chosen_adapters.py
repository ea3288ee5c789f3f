"""Which adapters an engine applies, and how strongly: checked, and stacked into one pair of factors for each weight."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from quantlab.adapters.adapter import Adapter, check_fits
from quantlab.adapters.combine import Source, Weighted, folded_pairs, weighted_adapters
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
    return tuple((adapter, weight) for adapter, weight in chosen if weight)


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
    if adapter.method == "merge-aware":
        logger.warning("%s: was trained for fused weights; beside them its results differ a little", adapter.path)


def stacked_factors(chosen: Iterable[Weighted]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """All updates of each weight as one: float32 (A [rank, in], B [out, rank]), scales and weights in B."""
    return {name: (pair.a, pair.b) for name, pair in folded_pairs(chosen).items()}


def fingerprint_of(chosen: Iterable[Weighted]) -> str:
    """A hash of what the adapters do together; empty for none."""
    told = "".join(f"{adapter.fingerprint()} {weight!r}\n" for adapter, weight in chosen)
    return hashlib.sha256(told.encode()).hexdigest()[:16] if told else ""
