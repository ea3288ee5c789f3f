"""A merge config whose models are adapters alone: merged to an adapter, in peft's files."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from quantlab.adapters.adapter import Adapter
from quantlab.adapters.reading import check_not_around, is_adapter, read_adapter
from quantlab.checkpoint.atomic import check_destination
from quantlab.errors import InputError
from quantlab.merging.adapters import merge_adapters, write_merged_adapter
from quantlab.merging.config import MergeConfig, Parameters
from quantlab.merging.memory import peak_resident_bytes
from quantlab.merging.methods.method import REQUIRED, Parameter, parameters_of
from quantlab.merging.methods.table import METHODS
from quantlab.merging.report import MergeReport, TensorOutcome
from quantlab.merging.values import BEGINNING, Scalar, Setting


def merges_adapters(config: MergeConfig) -> bool:
    """Whether the config's models are adapters' folders."""
    return bool(config.models) and all(
        model.reference.adapter is None and is_adapter(Path(model.reference.model).expanduser())
        for model in config.models
    )


def merge_adapters_of(
    config: MergeConfig, out: Path, *, rank: int | None, seed: int, overwrite: bool, dry_run: bool
) -> MergeReport:
    """Merge adapters to an adapter. A base model in the config is not read: an adapter's base is no update.

    Args:
        out: folder to make.
        rank: of the result; None: sums are exact, and others get the largest rank that an adapter has.

    Raises:
        InputError: parameters that differ between tensors; see `adapters.merge_adapters`; an `out` that exists or is
            one of the adapters.
    """
    started = time.monotonic()
    adapters = [read_adapter(Path(model.reference.model).expanduser()) for model in config.models]
    for adapter in adapters:
        check_not_around(adapter.path, out)
    check_destination(out, overwrite)
    parameters = _parameters(config)
    least: list[tuple[float, str]] = []

    def captured(name: str, share: float) -> None:
        least.append((share, name))

    merged = merge_adapters(adapters, None, config.method, parameters, rank, seed=seed, captured=captured)
    if not dry_run:
        write_merged_adapter(merged, adapters[0], out, overwrite=overwrite)
    return _report(config, merged, started, dry_run, _notes(merged, least))


def _notes(merged: Adapter, least: list[tuple[float, str]]) -> tuple[str, ...]:
    rank = max((pair.rank for pair in merged.pairs.values()), default=0)
    if not least:
        return (f"the sum is exact: its rank is {rank}",)
    kept, name = min(least)
    return (f"rank {rank} keeps {kept:.2%} or more of each merged update's squared norm (least: {name})",)


def _report(config: MergeConfig, merged: Adapter, started: float, dry_run: bool, notes: tuple[str, ...]) -> MergeReport:
    how = "planned" if dry_run else "merged"
    details = tuple(TensorOutcome(name, pair.shape, how, "f32") for name, pair in merged.pairs.items())
    return MergeReport(
        method=config.method,
        tensors=len(details),
        copied=0,
        parameters=merged.parameters,
        bytes=4 * merged.parameters,
        seconds=time.monotonic() - started,
        peak_rss_bytes=peak_resident_bytes(),
        memory_bytes=0,
        requantization_error=None,
        details=details,
        notes=(*config.notes, *notes),
    )


def _parameters(config: MergeConfig) -> dict[str, Any]:
    """One value of each parameter for all tensors; per-model ones as tuples."""
    found: dict[str, Any] = {}
    for parameter in parameters_of(METHODS[config.method]).values():
        sections: list[Parameters] = [model.parameters for model in config.models] if parameter.per_model else [{}]
        values = [_value(parameter, section, config) for section in sections]
        if any(value is not None for value in values):
            given = [parameter.default if value is None else value for value in values]
            found[parameter.name] = tuple(given) if parameter.per_model else given[0]
    return found


def _value(parameter: Parameter, section: Parameters, config: MergeConfig) -> Scalar | None:
    for level in (section, config.parameters):
        setting = level.get(parameter.name)
        if setting is not None:
            return _single(setting, parameter.name, config)
    if parameter.default is REQUIRED:
        raise InputError(f"{config.source}: {config.method} needs {parameter.name}; give it below parameters")
    return None


def _single(setting: Setting, name: str, config: MergeConfig) -> Scalar:
    first, *others = setting.alternatives
    value = setting.at("", BEGINNING)
    if others or first.filter is not None or isinstance(first.value, tuple) or value is None:
        raise InputError(f"{config.source}: {name}: adapters are merged with one value for all tensors; give a number")
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{config.source}: {name}: {value} is no number to merge with")
    return value
