"""Which layers of which models each layer of the output is merged of, and what config.json says of them then."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from quantlab.checkpoint.gguf_architectures import ROWS
from quantlab.checkpoint.gguf_details import FULL, GEMMA_PATTERN, SLIDING
from quantlab.checkpoint.gguf_sizes import MAX_BLOCKS
from quantlab.merging.config import MergeConfig, MergedModel, Parameters, Slice
from quantlab.merging.faults import Faults
from quantlab.merging.plan_types import OpenedModel
from quantlab.merging.references import ModelReference
from quantlab.merging.values import BEGINNING, END, position_of

_LAYER = re.compile(r"(?<=\.)(?:layers|h)\.(0|[1-9]\d{0,8})(?=\.)")
_NOT_PER_LAYER = ("architectures", "eos_token_id")  # lists that may happen to be as long as there are layers
LAYER_TYPES = "layer_types"


@dataclass(frozen=True)
class PlacedModel:
    """A model at one place of the output: its layer there, and the parameters that are this model's own."""

    reference: ModelReference
    layer: int | None
    parameters: Parameters = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """One layer of the output, or what lies before or behind all layers.

    Attributes:
        kind: "before" (embeddings), "layer", or "after" (the last norm and the head).
        layer: of the output.
        position: on gradients: from 0 for the slice's first layer to 1 for its last.
        parameters: the slice's.
    """

    kind: str
    layer: int | None
    position: Fraction
    sources: tuple[PlacedModel, ...]
    base: PlacedModel | None
    parameters: Parameters = field(default_factory=dict)

    @property
    def models(self) -> tuple[PlacedModel, ...]:
        """The sources, and the base before them."""
        return self.sources if self.base is None else (self.base, *self.sources)


def split_layer(name: str) -> tuple[str, int | None]:
    """A tensor's name with {} in the place of its layer's number, and that number."""
    found = _LAYER.search(name)
    if found is None:
        return name, None
    return f"{name[: found.start(1)]}{{}}{name[found.end(1) :]}", int(found[1])


def with_layer(template: str, layer: int | str) -> str:
    """The name that `split_layer` splits into a template and a layer."""
    return template.replace("{}", str(layer), 1)


def layers_of(model: OpenedModel) -> int:
    """How many layers a model's tensors are of."""
    numbers = {layer for name in model.names if (layer := split_layer(name)[1]) is not None}
    return max(numbers) + 1 if numbers else 0


def lay_out(
    config: MergeConfig, opened: Mapping[ModelReference, OpenedModel], base_of_deltas: bool, faults: Faults
) -> tuple[Place, ...]:
    """The output's places in order.

    What lies before the layers is merged of the first slice's models, what lies behind them of the last one's.

    Args:
        base_of_deltas: whether the method takes a base; then it is no source, wherever the config lists it.
    """
    counts = {reference: layers_of(model) for reference, model in opened.items()}
    _check_counts(config, opened, counts, faults)
    slices = config.slices or (Slice(config.models),)
    found = [_slice(config, piece, i, counts, base_of_deltas, faults) for i, piece in enumerate(slices)]
    layers = [place for places in found for place in places if place.kind == "layer"]
    if len(layers) > MAX_BLOCKS:
        faults.add(f"the slices have {len(layers)} layers together", f"give {MAX_BLOCKS} at most")
    numbered = [
        Place("layer", i, place.position, place.sources, place.base, place.parameters) for i, place in enumerate(layers)
    ]
    return (found[0][0], *numbered, found[-1][-1])


def _check_counts(
    config: MergeConfig,
    opened: Mapping[ModelReference, OpenedModel],
    counts: Mapping[ModelReference, int],
    faults: Faults,
) -> None:
    """Refuse models whose tensors are of other layers than config.json counts.

    Raises:
        MergeError: there is one.
    """
    for reference in config.references:
        model = opened[reference]
        row = ROWS[model.family.model_type]
        stated = row.config_values(model.config, "config.json").get(row.name("blocks"))
        if counts[reference] != stated:
            problem = f"{reference}: its tensors are of {counts[reference]} layers, and config.json says {stated}"
            faults.add(problem, "mend its config.json or download it again")
    faults.check()


def _slice(
    config: MergeConfig,
    piece: Slice,
    number: int,
    counts: Mapping[ModelReference, int],
    base_of_deltas: bool,
    faults: Faults,
) -> list[Place]:
    """A slice's layers, with what lies before and behind the layers of its models around them."""
    where = f"slices[{number}]: " if config.slices else ""
    base = (piece.base or config.base) if base_of_deltas else None
    ranges = [_range(source, counts, where, faults) for source in piece.sources]
    if len({last - first for first, last in ranges}) > 1:
        listed = ", ".join(
            f"{last - first} of {source.reference}" for source, (first, last) in zip(piece.sources, ranges, strict=True)
        )
        way_out = "give ranges of equal length" if where else "choose layers with slices and their layer_range"
        faults.add(f"{where}unequal numbers of layers: {listed}", way_out)
    length = min((last - first for first, last in ranges), default=0)
    starts = [first for first, _ in ranges]
    merged = [(source, start) for source, start in zip(piece.sources, starts, strict=True) if source.reference != base]
    own = [start for source, start in zip(piece.sources, starts, strict=True) if source.reference == base]
    start_of_base = 0 if base is None else own[0] if own else _base_start(base, ranges, counts, where, faults)

    def place(kind: str, at: int, position: Fraction) -> Place:
        def placed(reference: ModelReference, start: int, parameters: Parameters) -> PlacedModel:
            return PlacedModel(reference, start + at if kind == "layer" else None, parameters)

        sources = tuple(placed(source.reference, start, source.parameters) for source, start in merged)
        base_there = None if base is None else placed(base, start_of_base, {})
        return Place(kind, None, position, sources, base_there, piece.parameters)

    layers = [place("layer", i, position_of(i, length)) for i in range(length)]
    return [place("before", 0, BEGINNING), *layers, place("after", 0, END)]


def _range(source: MergedModel, counts: Mapping[ModelReference, int], where: str, faults: Faults) -> tuple[int, int]:
    """A source's layers, cut to those that it has."""
    count = counts[source.reference]
    first, last = source.layers or (0, count)
    if last > count:
        faults.add(f"{where}{source.reference} has {count} layers, and layer_range is [{first}, {last}]", "mend it")
    return min(first, count), min(last, count)


def _base_start(
    base: ModelReference,
    ranges: Sequence[tuple[int, int]],
    counts: Mapping[ModelReference, int],
    where: str,
    faults: Faults,
) -> int:
    """Where the base's layers begin that is not among a slice's sources: where theirs do, if all begin at one."""
    if len(set(ranges)) > 1:
        way_out = f"list {base} among them with its own layer_range"
        faults.add(f"{where}sources have other ranges, so that the base's is not known", way_out)
    first, last = max(ranges, default=(0, 0))
    if last > counts[base] or (not where and last != counts[base]):
        way_out = "choose layers with slices and their layer_range" if not where else "give layers that it has"
        faults.add(f"{where}the base {base} has {counts[base]} layers, the models {last}", way_out)
        return 0
    return first


# ---- config.json


def arranged_config(
    config: Mapping[str, Any],
    places: Sequence[Place],
    opened: Mapping[ModelReference, OpenedModel],
    faults: Faults,
) -> dict[str, Any]:
    """`config` for the layers of `places`: their number, and what it says of each."""
    layers = [place for place in places if place.kind == "layer"]
    row = ROWS[str(config["model_type"])]
    known = {key: value for key, value in config.items() if row.aliases.get(key) != row.name("blocks")}
    types = {reference: _layer_types(model) for reference, model in opened.items()}
    found = [_type_of(place, types, faults) for place in layers]
    arranged = known | {row.name("blocks"): len(layers)}
    primary_types = _listed_types(config, len(layers))
    if any(kind is not None for kind in found) and found != primary_types:
        arranged |= {LAYER_TYPES: [kind or FULL for kind in found]}
        arranged.pop("sliding_window_pattern", None)  # transformers goes by the list where there is one
    if not _is_as_it_was(layers, config, row.name("blocks")):
        _check_expressible(config, layers, opened, faults)
    return arranged


def _is_as_it_was(layers: Sequence[Place], config: Mapping[str, Any], key: str) -> bool:
    in_order = all(model.layer == place.layer for place in layers for model in place.models)
    return in_order and config.get(key, len(layers)) == len(layers)


def _check_expressible(
    config: Mapping[str, Any],
    layers: Sequence[Place],
    opened: Mapping[ModelReference, OpenedModel],
    faults: Faults,
) -> None:
    """Refuse what hangs on a layer's number, which changes."""
    way_out = "config.json cannot say this of other layers: keep all layers in their order"
    if config.get("scale_attn_by_inverse_layer_idx"):
        faults.add("scale_attn_by_inverse_layer_idx divides attention by the layer's number", way_out)
    for reference in dict.fromkeys(model.reference for place in layers for model in place.models):
        model = opened[reference]
        count = layers_of(model)
        for key, value in model.config.items():
            is_known = key == LAYER_TYPES or key in _NOT_PER_LAYER
            if not is_known and isinstance(value, list) and len(value) == count > 2:
                faults.add(f"{reference}: {key} in config.json has as many entries as there are layers", way_out)


def _type_of(place: Place, types: Mapping[ModelReference, list[str] | None], faults: Faults) -> str | None:
    """What kind of attention an output layer has; None where its models have but one."""
    found: list[str | None] = []
    for model in place.models:
        own = types[model.reference]
        assert model.layer is not None
        found.append(None if own is None or model.layer >= len(own) else own[model.layer])
    if len({kind or FULL for kind in found}) > 1:
        pairs = zip(place.models, found, strict=True)
        listed = ", ".join(f"{kind or FULL} in layer {model.layer} of {model.reference}" for model, kind in pairs)
        faults.add(f"layer {place.layer} would be of two kinds: {listed}", "choose layers of one kind")
    return next((kind for kind in found if kind is not None), None)


def _layer_types(model: OpenedModel) -> list[str] | None:
    return _listed_types(model.config, layers_of(model))


def _listed_types(config: Mapping[str, Any], count: int) -> list[str] | None:
    """`layer_types` of a config, as written or as its model type has it; None where all layers are of one kind."""
    row = ROWS[str(config["model_type"])]
    values = row.config_values(config, "config.json")
    listed = values.get(LAYER_TYPES, None)
    if isinstance(listed, list):
        return [str(kind) for kind in listed]
    if row.model_type in GEMMA_PATTERN:
        every = values.integer("sliding_window_pattern", GEMMA_PATTERN[row.model_type], least=0)
        return [FULL if every and (layer + 1) % every == 0 else SLIDING for layer in range(count)]
    if row.model_type in ("qwen2", "qwen3") and values.flag("use_sliding_window"):
        first = values.integer("max_window_layers", least=0)
        return [SLIDING if layer >= first else FULL for layer in range(count)]
    return None
