"""The parameters of every tensor, looked up where a config may give them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quantlab.errors import InputError
from quantlab.merging.config import MergeConfig, Parameters
from quantlab.merging.faults import Faults
from quantlab.merging.layers import Place, PlacedModel
from quantlab.merging.methods.method import REQUIRED, MergeMethod, Parameter, check_parameters, parameters_of
from quantlab.merging.references import ModelReference
from quantlab.merging.values import Scalar, value_at


class ParameterFinder:
    """Looks up one tensor's parameters after the other, and remembers what is missing or wrong."""

    def __init__(self, config: MergeConfig, method: MergeMethod, faults: Faults, notes: list[str]) -> None:
        self._config, self._method, self._faults, self._notes = config, method, faults, notes
        self._schema = parameters_of(method)
        self._missing: dict[tuple[str, ModelReference | None], str] = {}
        self._checked: set[tuple[int, str]] = set()

    def values(self, place: Place, name: str) -> dict[str, Any]:
        """The parameters of output tensor `name`; per-model ones are tuples in the order of the place's sources."""
        found: dict[str, Any] = {}
        for parameter in self._schema.values():
            if parameter.per_model:
                found[parameter.name] = tuple(self._value(parameter, place, name, model) for model in place.sources)
            else:
                found[parameter.name] = self._value(parameter, place, name, None)
        self._check(place, name, found)
        return found

    def report(self, names: Sequence[str]) -> None:
        """List what is missing, and the filters that match none of `names`, the output's tensors."""
        for (parameter, model), name in self._missing.items():
            whose = "" if model is None else f" of {model}"
            way_out = f"give it below parameters: {{{parameter}: ...}}"
            self._faults.add(f"{self._config.method} needs {parameter}{whose} for {name}, and there is none", way_out)
        for parameters in _sections(self._config):
            for parameter, setting in parameters.items():
                for filter in setting.filters:
                    if filter != "*" and not any(filter in name for name in names):
                        self._notes.append(
                            f"{parameter}: no tensor's name has {filter!r} in it, which a filter asks for"
                        )

    def _value(self, parameter: Parameter, place: Place, name: str, model: PlacedModel | None) -> Scalar | None:
        sections = [place.parameters, self._config.parameters]
        if model is not None:
            sections.insert(0, model.parameters)
        value = value_at([section.get(parameter.name) for section in sections], name, place.position)
        if value is not None:
            return value
        if place.kind != "layer" and parameter.name in self._method.outside_layers:
            outside: Scalar = self._method.outside_layers[parameter.name]
            return outside
        if parameter.default is not REQUIRED:
            default: Scalar | None = parameter.default
            return default
        self._missing.setdefault((parameter.name, None if model is None else model.reference), name)
        return None

    def _check(self, place: Place, name: str, found: dict[str, Any]) -> None:
        """Ask the method, once for all tensors with the same parameters."""
        key = (len(place.sources), repr(found))
        if self._missing or key in self._checked:
            return
        self._checked.add(key)
        given = {parameter: value for parameter, value in found.items() if value is not None}
        try:
            check_parameters(self._method, given, len(place.sources))
        except InputError as error:
            wrong_number = not self._fits(len(place.sources))
            self._faults.add(f"{self._config.method}: {error}" if wrong_number else f"{name}: {error}")

    def _fits(self, models: int) -> bool:
        fewest, most = self._method.models
        return fewest <= models and (most is None or models <= most)


def _sections(config: MergeConfig) -> list[Parameters]:
    slices = [part for piece in config.slices for part in (piece.parameters, *(s.parameters for s in piece.sources))]
    return [config.parameters, *(model.parameters for model in config.models), *slices]
