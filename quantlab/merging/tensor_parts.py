"""Which tensors of the models each output tensor is merged of, and what of them does not fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from quantlab.merging.faults import Faults
from quantlab.merging.layers import Place, PlacedModel, split_layer, with_layer
from quantlab.merging.plan_types import OpenedModel, Part, RowOverride
from quantlab.merging.references import ModelReference
from quantlab.merging.vocabulary import Alignment

_EMBEDDINGS = ("token_embd", "position_embd")  # GGUF's names of what lies before the layers
_TOGETHER = "merge models of one family and size, or leave the odd one out"


@dataclass(frozen=True)
class PlannedParts:
    """An output tensor's origins."""

    name: str
    shape: tuple[int, ...]
    base: Part | None
    parts: tuple[Part, ...]
    overrides: tuple[RowOverride, ...]


class PartFinder:
    """Finds the parts of each place of the output; what is missing or has another shape is listed by `report`."""

    def __init__(
        self,
        places: Sequence[Place],
        opened: Mapping[ModelReference, OpenedModel],
        alignment: Alignment,
        zero_biases: bool,
        faults: Faults,
    ) -> None:
        self._opened, self._alignment, self._zero_biases, self._faults = opened, alignment, zero_biases, faults
        used = dict.fromkeys(model.reference for place in places for model in place.models)
        self._indices = {reference: _index(opened[reference]) for reference in used}
        self._family = opened[next(iter(used))].family
        self._untied = any(not opened[model.reference].tied for model in (*places[0].models, *places[-1].models))
        self._missing: dict[tuple[str, ModelReference], list[int | None]] = {}
        self._shapes: dict[str, dict[tuple[int, ...], dict[str, None]]] = {}

    def parts(self, place: Place) -> Iterator[PlannedParts]:
        """The tensors of one place, in the order of the first model's files."""
        for template in self._templates(place):
            name = template if place.layer is None else with_layer(template, place.layer)
            found = [self._part(model, template) for model in place.models]
            present = [part for part in found if part is not None]
            shape = self._shape(template, present)
            if shape is not None and len(present) == len(found):
                base, parts = (None, present) if place.base is None else (present[0], present[1:])
                yield PlannedParts(name, shape, base, tuple(parts), self._overrides(template))

    def report(self) -> None:
        """List what `parts` left out."""
        listed: dict[str, list[str]] = {}
        for (template, reference), layers in self._missing.items():
            numbers = [layer for layer in layers if layer is not None]
            name = with_layer(template, _ranges(numbers)) if numbers else template
            listed.setdefault(str(reference), []).append(name)
        for shown, names in listed.items():
            biases = [name for name in names if name.endswith(".bias")]
            others = [name for name in names if not name.endswith(".bias")]
            if biases:
                way_out = "let zeros stand for them: missing_biases: zero"
                self._faults.add(f"{shown} lacks biases that others have: {', '.join(biases)}", way_out)
            if others:
                self._faults.add(f"{shown} lacks tensors that others have: {', '.join(others)}", _TOGETHER)
        if self._shapes:
            shapes = "; ".join(_shown_shapes(template, found) for template, found in self._shapes.items())
            self._faults.add(f"tensors have other shapes: {shapes}", _TOGETHER)

    def _templates(self, place: Place) -> list[str]:
        """Names of the place's tensors, with {} for the layer's number."""
        found: dict[str, None] = {}
        for model in place.models:
            found |= dict.fromkeys(self._indices[model.reference].get(model.layer, ()))
        if place.kind == "layer":
            return list(found)
        head = self._family.head
        if self._untied:
            found[head] = None
        before = place.kind == "before"
        return [name for name in found if self._lies_before(name) == before]

    def _lies_before(self, name: str) -> bool:
        stem = (self._family.gguf_name(name) or "").partition(".")[0]
        return stem in _EMBEDDINGS

    def _part(self, model: PlacedModel, template: str) -> Part | None:
        reference, opened = model.reference, self._opened[model.reference]
        names = self._indices[reference].get(model.layer, {})
        rows = self._alignment.rows.get(reference) if self._is_vocabulary(template) else None
        if template in names:
            return Part(reference, names[template], rows)
        if template == self._family.head and opened.tied:
            return Part(reference, self._family.embedding, rows)
        if template.endswith(".bias") and self._zero_biases:
            return Part(reference, template if model.layer is None else with_layer(template, model.layer), zeros=True)
        self._missing.setdefault((template, reference), []).append(model.layer)
        return None

    def _is_vocabulary(self, template: str) -> bool:
        return template in (self._family.embedding, self._family.head)

    def _shape(self, template: str, parts: Sequence[Part]) -> tuple[int, ...] | None:
        """The shape of all parts; None where they have several."""
        shapes: dict[tuple[int, ...], dict[str, None]] = {}
        for part in parts:
            if not part.zeros:
                shape = self._opened[part.model].shape(part.name)
                shape = shape if part.rows is None else (len(part.rows), *shape[1:])
                shapes.setdefault(shape, {})[str(part.model)] = None
        if len(shapes) == 1:
            return next(iter(shapes))
        differ_in_rows_alone = len({shape[1:] for shape in shapes}) == 1
        if not (self._is_vocabulary(template) and differ_in_rows_alone and self._alignment.is_refused):
            known = self._shapes.setdefault(template, {})
            for shape, models in shapes.items():
                known.setdefault(shape, {}).update(models)
        return None

    def _overrides(self, template: str) -> tuple[RowOverride, ...]:
        if not self._is_vocabulary(template) or not self._alignment.tokens:
            return ()
        names = {}
        for _, source, _ in self._alignment.tokens:
            if source.model is not None:
                is_there = template in self._opened[source.model].names
                names[source.model] = template if is_there else self._family.embedding
        return self._alignment.overrides(names)


def _index(model: OpenedModel) -> dict[int | None, dict[str, str]]:
    """By layer (None for what belongs to none): the full name of each tensor by its template."""
    found: dict[int | None, dict[str, str]] = {}
    for name in model.names:
        template, layer = split_layer(name)
        found.setdefault(layer, {})[template] = name
    return found


def _ranges(layers: Sequence[int]) -> str:
    """[0, 1, 2, 5] as "0-2,5"."""
    runs: list[list[int]] = []
    for layer in sorted(set(layers)):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _shown_shapes(template: str, found: Mapping[tuple[int, ...], Mapping[str, None]]) -> str:
    listed = ", ".join(f"{list(shape)} in {' and '.join(models)}" for shape, models in found.items())
    return f"{with_layer(template, '*')} is {listed}"
