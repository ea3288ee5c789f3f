"""Several adapters as one: their updates add up, so their factors lie side by side along the rank."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from quantlab.adapters.adapter import Adapter, LowRankPair
from quantlab.adapters.reading import read_adapter
from quantlab.errors import InputError

Weighted = tuple[Adapter, float]
Source = str | Path | Adapter | tuple[str | Path | Adapter, float]


def weighted_adapters(sources: Source | Sequence[Source]) -> list[Weighted]:
    """One adapter or several with their weights, 1 where none is given; folders are read.

    Raises:
        InputError: an adapter that cannot be read, or a weight that is no finite number.
    """
    if isinstance(sources, (str, Path, Adapter)):
        return [_weighted(sources, 1.0)]
    if isinstance(sources, tuple) and len(sources) == 2 and isinstance(sources[1], (int, float)):
        return [_weighted(*sources)]
    found = []
    for source in sources:
        assert not isinstance(source, (int, float))
        found.append(_weighted(*source) if isinstance(source, tuple) else _weighted(source, 1.0))
    return found


def _weighted(which: str | Path | Adapter, weight: float) -> Weighted:
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
        raise InputError(f"adapter weight {weight!r}: a finite number is expected")
    return which if isinstance(which, Adapter) else read_adapter(which), float(weight)


def combined_pairs(adapters: Sequence[Weighted]) -> dict[str, LowRankPair]:
    """One pair a weight: a single adapter's as it is if its weight is 1, else `folded_pairs`.

    Raises:
        InputError: more than one of them, or one with a weight, has DoRA's magnitudes: those do not add up.
    """
    if len(adapters) == 1 and adapters[0][1] == 1:
        return dict(adapters[0][0].pairs)
    for adapter, _ in adapters:
        if adapter.has_magnitudes:
            raise InputError(f"{adapter.path}: is a DoRA, which cannot be weighted or added to others; use it alone")
    return folded_pairs(adapters)


def folded_pairs(adapters: Iterable[Weighted]) -> dict[str, LowRankPair]:
    """One pair a weight, adapters one after the other by rank, with a scale of 1.

    Scale and weight are folded into `b`: one rounding, and exact for the powers of two that they mostly are.
    """
    parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for adapter, weight in adapters:
        for name, pair in adapter.pairs.items():
            parts.setdefault(name, []).append((pair.a, pair.b * np.float32(pair.scale * weight)))
    return {
        name: LowRankPair(
            np.ascontiguousarray(np.concatenate([a for a, _ in found]), np.float32),
            np.ascontiguousarray(np.concatenate([b for _, b in found], axis=1), np.float32),
            1.0,
        )
        for name, found in parts.items()
    }
