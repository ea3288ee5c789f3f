"""Whether models are of one kind, told from config.json: what shapes alone do not show."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from quantlab.checkpoint.checked_values import CheckedValues
from quantlab.checkpoint.gguf_architectures import ROWS, ModelRow
from quantlab.checkpoint.gguf_sizes import Sizes, sizes_of_config
from quantlab.checkpoint.rope import rope_of_config, ropes_by_layer_type
from quantlab.errors import InputError
from quantlab.merging.faults import Faults
from quantlab.merging.plan_types import OpenedModel
from quantlab.merging.references import ModelReference

_TOGETHER = "merge models of one family, fine-tuned from one base"

Asked = Callable[[ModelRow, CheckedValues, Sizes], Any]


def check_families(
    models: Sequence[ModelReference], opened: Mapping[ModelReference, OpenedModel], faults: Faults
) -> None:
    """Refuse models of several families, whose tensors have nothing to do with each other."""
    families: dict[str, list[str]] = {}
    for model in models:
        families.setdefault(opened[model].family.model_type, []).append(str(model))
    if len(families) > 1:
        listed = ", ".join(f"{family}: {' and '.join(names)}" for family, names in families.items())
        faults.add(f"models of {len(families)} families ({listed})", _TOGETHER)


def check_configs(
    models: Sequence[ModelReference],
    opened: Mapping[ModelReference, OpenedModel],
    faults: Faults,
    notes: list[str],
) -> None:
    """Refuse what makes equal shapes mean different things; note what the output takes from the first model."""
    first = models[0]
    asked = {model: _answers(opened[model], _MEANING) for model in models}
    for name, usual in asked[first].items():
        if others := {model: answers[name] for model, answers in asked.items() if answers[name] != usual}:
            listed = ", ".join(f"{value} in {model}" for model, value in {first: usual, **others}.items())
            faults.add(f"{name}: {listed}: their weights do not mean the same", _TOGETHER)
    settings = {model: _answers(opened[model], _SETTINGS) for model in models}
    for name, usual in settings[first].items():
        if differing := [str(model) for model, answers in settings.items() if answers[name] != usual]:
            notes.append(f"{name} as in {first}; {', '.join(differing)} differ")


def _answers(model: OpenedModel, questions: Mapping[str, Asked]) -> dict[str, Any]:
    row = ROWS[model.family.model_type]
    values = row.config_values(model.config, str(model.checkpoint.path))
    sizes = sizes_of_config(row, values)
    return {name: ask(row, values, sizes) for name, ask in questions.items()}


def _rope(row: ModelRow, values: CheckedValues, sizes: Sizes) -> object:
    if row.rope is None:
        return None
    try:
        if row.model_type == "gemma3_text":
            return ropes_by_layer_type(values, row.rope, sizes.head_dim, sizes.context)
        return rope_of_config(values, row.rope, sizes.head_dim, sizes.context)
    except InputError:  # one that quantlab does not compute; it can be kept all the same
        return [values.get(key, None) for key in ("rope_parameters", "rope_scaling", "rope_theta")]


def _window(row: ModelRow, values: CheckedValues, sizes: Sizes) -> object:
    return values.get("sliding_window", None) if values.get("use_sliding_window", True) else None


_MEANING: dict[str, Asked] = {
    "heads": lambda row, values, sizes: sizes.heads,
    "heads of keys and values": lambda row, values, sizes: sizes.kv_heads,
    "width of a head": lambda row, values, sizes: sizes.head_dim,
    "activation": lambda row, values, sizes: values.get(row.activation),
    "parallel residual": lambda row, values, sizes: values.get("use_parallel_residual", None),
}
_SETTINGS: dict[str, Asked] = {
    "context length": lambda row, values, sizes: sizes.context,
    "the norms' epsilon": lambda row, values, sizes: sizes.epsilon,
    "rotary embedding": _rope,
    "sliding window": _window,
}
