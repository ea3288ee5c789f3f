"""The `parameters` sections of a merge config, against what the chosen method takes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from quantlab.merging.faults import Faults, nearest
from quantlab.merging.values import Alternative, Gradient, Scalar, Setting
from quantlab.merging.yaml_lines import Node

if TYPE_CHECKING:
    from quantlab.merging.methods.method import Parameter

# mergekit's parameters that have nothing to act on here.
WITHOUT_EFFECT = {"int8_mask": "masks are never kept whole, so there is nothing to save"}


class ParameterReader:
    """Reads sections for one method; with None (an unknown one) it lets everything pass."""

    def __init__(self, method: str | None, faults: Faults, notes: list[str]) -> None:
        self.method = method
        self._faults, self._notes = faults, notes
        self._schema = None if method is None else _schema(method)

    @property
    def names(self) -> tuple[str, ...]:
        """Parameters that the method has."""
        return (*(self._schema or ()), *WITHOUT_EFFECT)

    def read(self, node: Node | None, *, of_model: bool = False) -> dict[str, Setting]:
        """A section's settings by parameter; `of_model` says that it is one model's own."""
        if node is None or node.value is None or self._schema is None:
            return {}
        if not isinstance(node.value, dict):
            self._faults.add(f"{node}: is no mapping of parameters", "write {name: value}")
            return {}
        found = {}
        for name, value in node.value.items():
            if name in WITHOUT_EFFECT and name not in self._schema:
                self._notes.append(f"{name} has no effect: {WITHOUT_EFFECT[name]}")
                continue
            parameter = self._parameter(name, value, of_model)
            setting = None if parameter is None else self._setting(value, parameter)
            if setting is not None:
                found[name] = setting
        return found

    def _parameter(self, name: str, node: Node, of_model: bool) -> Parameter | None:
        assert self._schema is not None
        if name not in self._schema:
            known = nearest(name, self._schema) if self._schema else "it has none"
            self._faults.add(f"{node}: {self.method} has no parameter {name!r}", known)
            return None
        parameter = self._schema[name]
        if of_model and not parameter.per_model:
            way_out = "move it to the parameters of the whole config or of the slice"
            self._faults.add(f"{node}: {name} is one for all models", way_out)
            return None
        return parameter

    def _setting(self, node: Node, parameter: Parameter) -> Setting | None:
        items = node.value if isinstance(node.value, list) else None
        if items and any(isinstance(item.value, dict) for item in items):
            read = [self._alternative(item, parameter) for item in items]
            return Setting(tuple(each for each in read if each is not None))
        value = self._value(node, parameter)
        return None if value is None else Setting((Alternative(value),))

    def _alternative(self, node: Node, parameter: Parameter) -> Alternative | None:
        entry = node.value if isinstance(node.value, dict) else {}
        for key in entry.keys() - {"filter", "value"}:
            self._faults.add(f"{entry[key]}: {key!r} is no key here", nearest(key, ("filter", "value")))
        if "value" not in entry:
            self._faults.add(f"{node}: has no value", "write {filter: part of a tensor's name, value: ...}")
            return None
        filter = entry["filter"].value if "filter" in entry else None
        if filter is not None and (not isinstance(filter, str) or not filter):
            self._faults.add(f"{entry['filter']}: {filter!r} is no part of a tensor's name")
            return None
        value = self._value(entry["value"], parameter)
        return None if value is None else Alternative(value, filter)

    def _value(self, node: Node, parameter: Parameter) -> Scalar | Gradient | None:
        if not isinstance(node.value, list):
            return self._scalar(node, parameter)
        if parameter.kind is not float or not node.value:
            self._faults.add(f"{node}: is {'a' if node.value else 'an empty'} list instead of {_wanted(parameter)}")
            return None
        values = [self._scalar(item, parameter) for item in node.value]
        return None if None in values else tuple(float(value) for value in values if value is not None)

    def _scalar(self, node: Node, parameter: Parameter) -> Scalar | None:
        value = _converted(node.value, parameter)
        if value is None:
            self._faults.add(f"{node}: {_shown(node.value)} is not {_wanted(parameter)}")
        return value


def _schema(method: str) -> dict[str, Parameter]:
    from quantlab.merging.methods.method import parameters_of
    from quantlab.merging.methods.table import METHODS

    return parameters_of(METHODS[method])


def _converted(value: object, parameter: Parameter) -> Scalar | None:
    """The value as the parameter's kind; YAML reads 1e-5 as text, and configs write flags as 1.0. None: it is none."""
    if isinstance(parameter.kind, tuple):
        return value if isinstance(value, str) and value in parameter.kind else None
    if parameter.kind is bool:
        return bool(value) if isinstance(value, bool | int | float) and value in (0, 1) else None
    number = _number(value)
    if number is None or not parameter.range.least <= number <= parameter.range.most:
        return None
    if parameter.kind is int:
        return int(number) if number == int(number) else None
    return number


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _wanted(parameter: Parameter) -> str:
    if isinstance(parameter.kind, tuple):
        return f"one of {', '.join(parameter.kind)}"
    if parameter.kind is bool:
        return "true or false"
    kind = "a whole number" if parameter.kind is int else "a number"
    least, most = parameter.range.least, parameter.range.most
    if math.isfinite(least) and math.isfinite(most):
        return f"{kind} from {least:g} to {most:g}"
    return f"{kind} of at least {least:g}" if math.isfinite(least) else kind


def _shown(value: object) -> str:
    return "a mapping" if isinstance(value, dict) else "a list" if isinstance(value, list) else repr(value)
