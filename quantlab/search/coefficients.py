"""What is learned of a merge: how much each model counts, in the whole model, by layer or by tensor.

A merge by `task_arithmetic` or `linear` is linear in its coefficients. They start as the config has them, and what
comes of them is a config again: the user's, with other weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from quantlab.checkpoint.tensors import FLOAT_DTYPES
from quantlab.errors import InputError
from quantlab.merging.config import MergeConfig, read_config
from quantlab.merging.layers import split_layer
from quantlab.merging.methods.method import arguments_of
from quantlab.merging.methods.sums import normalized
from quantlab.merging.methods.table import METHODS
from quantlab.merging.plan_types import MergePlan, TensorPlan

LEARNABLE = ("task_arithmetic", "linear")
GRAINS = ("model", "layer", "tensor")
DECIMALS = 6  # of coefficients in a config
WHOLE, BEFORE, BEHIND = "model", "embeddings", "output"  # groups that are no layer


@dataclass(frozen=True)
class Group:
    """Tensors that share their coefficients, one a model.

    Attributes:
        name: for people.
        tensors: names in the output.
        filters: parts of names that all of these tensors have and no others do; empty for all tensors.
    """

    name: str
    tensors: tuple[str, ...]
    filters: tuple[str, ...]


@dataclass(frozen=True)
class Coefficients:
    """Groups, models, and where the coefficients start; values are float64 [groups, models] everywhere.

    Attributes:
        entries: numbers of the merged models among the config's, the base of task arithmetic not counted.
        models: their names.
        keeps_sum: whether each group's coefficients keep their sum: a weighted average stays one.
    """

    method: str
    groups: tuple[Group, ...]
    entries: tuple[int, ...]
    models: tuple[str, ...]
    start: np.ndarray
    keeps_sum: bool

    def group_of(self) -> dict[str, int]:
        """The number of each tensor's group."""
        return {name: number for number, group in enumerate(self.groups) for name in group.tensors}

    def parameters(self, values: np.ndarray) -> dict[str, Any]:
        """The method's parameters for tensors of a group with these coefficients, [models]."""
        weight = tuple(float(value) for value in values)
        if self.method == "linear":
            return {"weight": weight, "normalize": self.keeps_sum}
        return {"weight": weight, "lambda": 1.0, "normalize": False}

    def gradient(self, found: np.ndarray) -> np.ndarray:
        """The part of a gradient along which coefficients may move."""
        return found - found.mean(axis=1, keepdims=True) if self.keeps_sum else found


def check_learnable(config: MergeConfig, grain: str) -> None:
    """Refuse a config whose coefficients are not learned.

    Raises:
        InputError: another method, slices, an unknown grain, a config that was not read from text.
    """
    if grain not in GRAINS:
        raise InputError(f"--learn-by {grain}: choose one of: {', '.join(GRAINS)}")
    if config.method not in LEARNABLE:
        raise InputError(f"--learn: learns weights of {' and '.join(LEARNABLE)}; {config.source} has {config.method}")
    if config.slices:
        raise InputError(f"--learn: learns weights of whole models; {config.source} has slices, write models instead")
    if not config.text:
        raise InputError(f"--learn: {config.source} has no YAML text to write the learned weights to")


def coefficients_of(config: MergeConfig, plan: MergePlan, grain: str) -> Coefficients:
    """The coefficients of a planned merge, by `grain` ("model", "layer" or "tensor").

    Raises:
        InputError: the config's weights differ within a group, or there is nothing that could differ.
    """
    is_delta = config.method == "task_arithmetic"
    entries = tuple(
        number for number, model in enumerate(config.models) if not (is_delta and model.reference == config.base)
    )
    plans = [tensor for tensor in plan.tensors if tensor.method == config.method and tensor.dtype in FLOAT_DTYPES]
    groups = _groups(plans, grain)
    by_name = {tensor.name: tensor for tensor in plans}
    normalizes = {bool(tensor.parameters["normalize"]) for tensor in plans}
    if not is_delta and len(normalizes) > 1:
        raise InputError(f"--learn: {config.source} normalizes some tensors' weights only; give normalize one value")
    keeps_sum = not is_delta and normalizes == {True}
    rows: list[tuple[float, ...]] = []
    for group in groups:
        found = {_effective(by_name[name]) for name in group.tensors}
        if len(found) > 1:
            way_out = "layer or tensor" if grain == "model" else "tensor"
            raise InputError(
                f"--learn-by {grain}: {config.source} has different weights within {group.name}; learn by {way_out}, "
                "or give one weight to start from"
            )
        rows += found
    start = np.array(rows, dtype=np.float64)
    if keeps_sum and start.shape[1] == 1:
        raise InputError(f"--learn: {config.source} averages one model; there is nothing to learn")
    names = tuple(str(config.models[number].reference) for number in entries)
    return Coefficients(config.method, groups, entries, names, start, keeps_sum)


def _effective(plan: TensorPlan) -> tuple[float, ...]:
    """What the models (linear) or their differences from the base are multiplied by."""
    given = arguments_of(METHODS[plan.method], plan.parameters, len(plan.parts))
    shares = normalized(given["weight"]) if given["normalize"] else list(given["weight"])
    return tuple(given.get("lambda_", 1.0) * share for share in shares)


def _groups(plans: Sequence[TensorPlan], grain: str) -> tuple[Group, ...]:
    names = [plan.name for plan in plans]
    if grain == "model":
        return (Group(WHOLE, tuple(names), ()),)
    if grain == "tensor":
        return tuple(Group(name, (name,), (name,)) for name in names)
    found: dict[str, tuple[list[str], dict[str, None]]] = {}
    layers_begun = False
    for name in names:
        template, layer = split_layer(name)
        layers_begun |= layer is not None
        word = f"layer {layer}" if layer is not None else BEHIND if layers_begun else BEFORE
        part = name if layer is None else f"{template.partition('{}')[0]}{layer}."
        tensors, filters = found.setdefault(word, ([], {}))
        tensors.append(name)
        filters[part] = None
    return tuple(Group(word, tuple(tensors), tuple(filters)) for word, (tensors, filters) in found.items())


def learned_config(config: MergeConfig, coefficients: Coefficients, values: np.ndarray, remark: str) -> MergeConfig:
    """The user's config with other weights, its text too.

    Args:
        remark: put before it as comments, line by line.
    """
    import yaml

    data = yaml.safe_load(config.text)
    models = _listed_models(data)
    everywhere = {key: value for key, value in (data.get("parameters") or {}).items() if key not in _REPLACED}
    common = coefficients.parameters(values[0])
    data["parameters"] = {**everywhere, **{key: value for key, value in common.items() if key != "weight"}}
    for column, number in enumerate(coefficients.entries):
        own = models[number].get("parameters") or {}
        models[number]["parameters"] = {**own, "weight": _setting(coefficients.groups, values[:, column])}
    comments = "".join(f"# {line}\n" for line in remark.splitlines())
    text = comments + yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120)
    return replace(read_config(text), source=config.source)


_REPLACED = ("weight", "lambda", "normalize")


def _listed_models(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    if "models" in data:
        return data["models"]
    (module,) = data["modules"].values()
    return module["models"]


def _setting(groups: Sequence[Group], values: np.ndarray) -> float | list[dict[str, Any]]:
    """A weight as the config has it. Longer filters come first: a tensor's name may be a part of another's."""
    if len(groups) == 1 and not groups[0].filters:
        return float(values[0])
    pairs = [(part, float(value)) for group, value in zip(groups, values, strict=True) for part in group.filters]
    pairs.sort(key=lambda pair: -len(pair[0]))
    return [{"filter": part, "value": value} for part, value in pairs]


def agrees(plan: MergePlan, coefficients: Coefficients, values: np.ndarray) -> bool:
    """Whether a planned merge gives every tensor its group's coefficients."""
    group_of = coefficients.group_of()
    return all(
        tensor.parameters == coefficients.parameters(values[group_of[tensor.name]])
        for tensor in plan.tensors
        if tensor.name in group_of
    )
