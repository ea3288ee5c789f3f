"""Adapters merged with adapters, to an adapter: sums exactly, side by side along the rank; all else on the products,
whose merge an SVD brings back to low rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quantlab.adapters.adapter import Adapter, LowRankPair, Training
from quantlab.adapters.combine import folded_pairs
from quantlab.adapters.peft_config import peft_config
from quantlab.adapters.peft_folder import CONFIG, base_of, write_peft_folder
from quantlab.adapters.truncated_svd import truncated_svd
from quantlab.checkpoint.json_file import read_json
from quantlab.errors import InputError
from quantlab.merging.methods.method import (
    MergeMethod,
    check_parameters,
    merge_part,
    merge_tensor,
    parameters_of,
    survey_for,
)
from quantlab.merging.methods.noise import Noise
from quantlab.merging.methods.table import METHODS
from quantlab.native import adapters as native_adapters

SUMS = ("linear", "task_arithmetic")  # weighted sums of the updates, which factors side by side are
NEED_INPUTS = ("regmean",)

Captured = Callable[[str, float], None]  # a tensor's name, the share of the merged update's squared norm that is kept


def merge_adapters(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None,
    method: str,
    parameters: Mapping[str, Any],
    rank: int | None = None,
    *,
    seed: int = 0,
    captured: Captured | None = None,
) -> Adapter:
    """One adapter out of several for the same base; an update that an adapter lacks counts as zero.

    The base of delta methods is no update. `linear` and `task_arithmetic` without `rank` are exact, to the rounding of
    one factor: the result's rank is the sum of the adapters'. Otherwise each merged update keeps its `rank` leading
    singular directions.

    Args:
        weights: one for each adapter, if the method has weights; None for its defaults.
        method: a name of the table of methods.
        parameters: the method's others; per-model ones have one value for each adapter.
        rank: None for exact sums, and for other methods the largest rank that an adapter has.
        seed: of methods that draw.
        captured: is called for every tensor that an SVD has cut.

    Raises:
        InputError: adapters of several bases or shapes, or with DoRA's magnitudes; an unknown method, one that needs
            layers' inputs, or wrong parameters.
    """
    _check_together(adapters)
    row = METHODS.get(method)
    if row is None:
        raise InputError(f"merge_method {method!r}: unknown; choose one of: {', '.join(METHODS)}")
    if method in NEED_INPUTS:
        raise InputError(
            f"merge_method {method}: needs the inputs of whole models' layers; fuse the adapters, and merge"
        )
    if rank is not None and rank < 1:
        raise InputError(f"--rank {rank}: at least 1 is needed")
    chosen = dict(parameters)
    if weights is not None and "weight" in parameters_of(row):
        chosen["weight"] = tuple(float(weight) for weight in weights)
    check_parameters(row, chosen, len(adapters))
    if method in SUMS and rank is None:
        return _side_by_side(adapters, _coefficients(row, chosen, len(adapters)))
    rank = rank or max(pair.rank for adapter in adapters for pair in adapter.pairs.values())
    return _by_products(adapters, row, chosen, rank, seed, captured)


def write_merged_adapter(adapter: Adapter, first: Adapter, out: Path, *, overwrite: bool = False) -> None:
    """Write a merged adapter as peft's two files; what they say of the base is what `first`, one of the merged, says.

    Raises:
        InputError: `out` exists or cannot be written, or `first` names no base.
    """
    transposed = bool(read_json(first.path / CONFIG).get("fan_in_fan_out"))
    write_peft_folder(adapter, peft_config(adapter, base_of(first.path), transposed=transposed), out, replace=overwrite)


def _check_together(adapters: Sequence[Adapter]) -> None:
    shapes: dict[str, tuple[Path, tuple[int, int]]] = {}
    faults = []
    for adapter in adapters:
        if adapter.has_magnitudes:
            raise InputError(f"{adapter.path}: is a DoRA, whose update depends on the base; fuse it, and merge models")
        for name, pair in adapter.pairs.items():
            where, shape = shapes.setdefault(name, (adapter.path, pair.shape))
            if shape != pair.shape:
                faults.append(f"{name} is {list(pair.shape)} in {adapter.path} and {list(shape)} in {where}")
    if faults:
        more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
        raise InputError(f"adapters of different models: {'; '.join(faults[:3])}{more}")
    bases = {adapter.training.base: adapter.path for adapter in adapters if adapter.training.base}
    if len(bases) > 1:
        one, other = list(bases.values())[:2]
        raise InputError(f"{one} and {other}: were trained on different bases; merge adapters of one base")


def _coefficients(row: MergeMethod, parameters: Mapping[str, Any], count: int) -> list[float]:
    """What a method that is a weighted sum multiplies each model by: its own arithmetic, on unit vectors."""
    merged = merge_tensor(row, torch.zeros(count), list(torch.eye(count)), parameters)
    return [float(value) for value in merged]


def _side_by_side(adapters: Sequence[Adapter], coefficients: Sequence[float]) -> Adapter:
    methods = {adapter.method for adapter in adapters}
    method = "block-sum" if methods == {"block-sum"} else "lora"  # constant along blocks they stay
    return _merged(adapters, method, folded_pairs(zip(adapters, coefficients, strict=True)))


def _merged(adapters: Sequence[Adapter], method: str, pairs: Mapping[str, LowRankPair]) -> Adapter:
    bases = {adapter.training.base for adapter in adapters}
    sizes = {adapter.training.vocabulary for adapter in adapters}
    training = Training(base=bases.pop() if len(bases) == 1 else "", vocabulary=sizes.pop() if len(sizes) == 1 else 0)
    return Adapter(adapters[0].path, method, pairs, training)


def _by_products(
    adapters: Sequence[Adapter],
    row: MergeMethod,
    parameters: Mapping[str, Any],
    rank: int,
    seed: int,
    captured: Captured | None,
) -> Adapter:
    names = list(dict.fromkeys(name for adapter in adapters for name in adapter.pairs))
    survey = survey_for(row, parameters, len(adapters)) if row.scope(parameters) == "model" else None
    surveyed = None
    if survey is not None:
        for _ in range(survey.passes):
            for name in names:
                survey.add(*_products(adapters, row, name))
            survey.end_pass()
        surveyed = survey.result()
    pairs = {}
    for name in names:
        base, products = _products(adapters, row, name)
        noise = Noise(seed, name)
        if survey is None:
            update = merge_tensor(row, base, products, parameters, noise=noise)
        else:
            update = merge_part(row, base, products, parameters, survey=surveyed, noise=noise)
        pairs[name], share = _low_rank(update, rank)
        if captured is not None:
            captured(name, share)
    return _merged(adapters, "lora", pairs)


def _products(
    adapters: Sequence[Adapter], row: MergeMethod, name: str
) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    """The base's zeros, None where the method uses no base, and the updates, float32 [out, in] each."""
    shape = next(adapter.pairs[name].shape for adapter in adapters if name in adapter.pairs)
    found = []
    for adapter in adapters:
        pair = adapter.pairs.get(name)
        if pair is None:
            found.append(torch.zeros(shape))
        else:
            a, b = np.ascontiguousarray(pair.a), np.ascontiguousarray(pair.b)
            found.append(torch.from_numpy(native_adapters.low_rank_product(a, b, pair.scale)))
    return None if row.base == "unused" else torch.zeros(shape), found


def _low_rank(update: torch.Tensor, rank: int) -> tuple[LowRankPair, float]:
    """The nearest pair of that rank or less, and the share of the squared norm that it keeps."""
    found = truncated_svd(update, rank)
    energy = float(update.square().sum(dtype=torch.float64))
    if not found.rank:
        return LowRankPair(np.zeros((1, update.shape[1]), np.float32), np.zeros((len(update), 1), np.float32), 1.0), 1.0
    root = found.s.sqrt()
    a = (root[:, None] * found.vh).to(torch.float32).contiguous().numpy()
    b = (found.u * root).to(torch.float32).contiguous().numpy()
    return LowRankPair(a, b, 1.0), min(1.0, float(found.s.square().sum()) / energy)
