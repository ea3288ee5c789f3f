"""From numbers that a search draws to merge configs: weights and densities of a method, or paths through layers.

Every gene has a range in whose middle the search starts, with a sixth of it as standard deviation (as optuna's CMA-ES
does, and as arXiv 2403.13187 has it for weights and densities: 0.5 and 1/6).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from quantlab.checkpoint.families import Family
from quantlab.errors import InputError
from quantlab.merging.layer_path import LayerPath, Slot, check_foldable, path_config
from quantlab.merging.layers import layers_of
from quantlab.merging.references import parse_reference
from quantlab.merging.sources import MergeSource, open_source
from quantlab.search.evolve_config import Genome, Range

# The usual ranges of searched parameters, by what methods call them.
RANGES: dict[str, Range] = {"weight": (0.0, 1.0), "density": (0.0, 1.0), "t": (0.0, 1.0)}
PLAIN_DENSITY = 0.5  # of an untuned merge
MOST_PAIRS = 1024  # of layers with a factor each
SIGMAS = 3.0  # from the middle of a layer's range to its ends, in standard deviations
FIRST_PASS = 2.0  # where the first model's own layers start, in standard deviations (arXiv 2403.13187, section 3.2)


@dataclass(frozen=True)
class Gene:
    """A number that is searched, and where."""

    name: str
    low: float
    high: float

    @property
    def middle(self) -> float:
        """Where the search starts."""
        return (self.low + self.high) / 2


Values = Mapping[str, float]  # by gene


class Space(Protocol):
    """What is searched.

    Attributes:
        genes: in an order that does not change.
        start: what is scored first.
        plain: what one would take without a search.
    """

    genes: tuple[Gene, ...]
    start: Values
    plain: Values

    def config(self, values: Values) -> str:
        """The merge config (YAML) that these values stand for."""


@dataclass(frozen=True)
class SearchedModel:
    """A model of a genome.

    Attributes:
        name: as merge configs have it.
    """

    name: str
    layers: int
    family: Family
    source: MergeSource


def open_models(names: Sequence[str]) -> dict[str, SearchedModel]:
    """Open models to see their layers.

    Raises:
        InputError: one cannot be read.
    """
    opened = {}
    for name in names:
        source = open_source(parse_reference(name))
        opened[name] = SearchedModel(name, layers_of(source), source.family, source)
    return opened


class ParameterSpace:
    """Parameters of a merge method: those of `RANGES` that it has, one for each model where the method has it so, and
    for each group of layers, if there are groups.

    Raises:
        InputError: the method is not known, has no such parameter, or the groups do not fit.
    """

    def __init__(self, genome: Genome, models: Sequence[SearchedModel]) -> None:
        from quantlab.merging.faults import nearest
        from quantlab.merging.methods.method import parameters_of
        from quantlab.merging.methods.table import METHODS

        if genome.method not in METHODS:
            raise InputError(
                f"genome.merge_method {genome.method!r} is not known; {nearest(str(genome.method), METHODS)}"
            )
        schema = parameters_of(METHODS[genome.method])
        ranges = {name: bounds for name, bounds in {**RANGES, **genome.ranges}.items() if name not in genome.fixed}
        for name in genome.ranges:
            if name not in schema or schema[name].kind is not float or name in genome.fixed:
                known = [each for each, parameter in schema.items() if parameter.kind is float]
                reason = "is among genome.parameters" if name in genome.fixed else nearest(name, known)
                raise InputError(f"genome.ranges: {genome.method} has no parameter {name!r} to search; {reason}")
        self._genome, self._models = genome, models
        self._searched = {name: (ranges[name], schema[name].per_model) for name in ranges if name in schema}
        if not self._searched:
            raise InputError(
                f"genome.merge_method {genome.method}: has none of {', '.join(ranges)}; name its genome.ranges"
            )
        self._groups = self._layer_groups()
        self.genes = tuple(
            Gene(_gene_name(name, model, group), *bounds)
            for group in range(len(self._groups) or 1)
            for name, (bounds, per_model) in self._searched.items()
            for model in (range(len(models)) if per_model else (None,))
        )
        self.start: Values = {gene.name: self._plain(gene) for gene in self.genes}
        self.plain: Values = self.start

    def config(self, values: Values) -> str:
        import yaml

        genome = self._genome
        content: dict[str, Any] = {"merge_method": genome.method}
        if genome.base is not None:
            content["base_model"] = genome.base
        content |= genome.settings
        shared = dict(genome.fixed)
        if not self._groups:
            content["models"] = [self._source(model, 0, values) for model in range(len(self._models))]
            shared |= self._of_all(0, values)
        else:
            content["slices"] = [self._slice(group, values) for group in range(len(self._groups))]
        if shared:
            content["parameters"] = shared
        return yaml.safe_dump(content, sort_keys=False)

    def _slice(self, group: int, values: Values) -> dict[str, Any]:
        layers = {"layer_range": list(self._groups[group])}
        sources = [self._source(model, group, values, layers) for model in range(len(self._models))]
        shared = self._of_all(group, values)
        return {"sources": sources, **({"parameters": shared} if shared else {})}

    def _source(
        self, model: int, group: int, values: Values, layers: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        searched = [name for name, (_, per_model) in self._searched.items() if per_model]
        own = {name: values[_gene_name(name, model, group)] for name in searched}
        return {"model": self._models[model].name, **(layers or {}), **({"parameters": own} if own else {})}

    def _of_all(self, group: int, values: Values) -> dict[str, float]:
        searched = [name for name, (_, per_model) in self._searched.items() if not per_model]
        return {name: values[_gene_name(name, None, group)] for name in searched}

    def _plain(self, gene: Gene) -> float:
        """Untuned: equal weights that add up to 1, half of each delta."""
        kind = gene.name.partition("[")[0].partition(".")[0]
        value = {"weight": 1 / len(self._models), "density": PLAIN_DENSITY}.get(kind, gene.middle)
        return min(max(value, gene.low), gene.high)

    def _layer_groups(self) -> list[tuple[int, int]]:
        size = self._genome.group
        if size is None:
            return []
        counts = {model.layers for model in self._models}
        if len(counts) > 1:
            raise InputError(
                f"genome.layer_granularity: the models have {sorted(counts)} layers; it needs equally many"
            )
        (count,) = counts
        return [(first, min(first + size, count)) for first in range(0, count, size)]


def _gene_name(name: str, model: int | None, group: int) -> str:
    """Such as weight[1].3: models by their number, so that all who share a study mean the same."""
    return f"{name}{'' if model is None else f'[{model}]'}{f'.{group}' if group else ''}"


class PathSpace:
    """Paths through the layers of models of one shape: all layers in an order, each of which is left out or not; and
    factors for the residual stream where a path goes on at another layer than the next.

    Paths begin with the first model's first layer and end with its last, as do embeddings and head. The order is that
    of arXiv 2403.13187 ("passes": model after model, some times over) or goes by depth: every model's first layer some
    times over, then every second one. What does well in practice, a layer run twice or one model's behind another's, is
    one gene from the first model by depth and up to some 2 x layers genes in passes; paths that go back to a lower
    layer are there in passes alone.

    Raises:
        InputError: a family that factors do not fold into, or too many of them.
    """

    def __init__(self, genome: Genome, models: Sequence[SearchedModel]) -> None:
        check_foldable(models[0].family)
        self.models, self._genome, self._family = tuple(models), genome, models[0].family
        own = [(model, layer) for model, each in enumerate(models) for layer in range(each.layers)]
        self._slots = own * genome.repetitions
        if genome.order == "depth":
            self._slots.sort(key=lambda slot: slot[1])  # models of one depth stay in turns
        firsts = {self._slots.index(slot) for slot in own}
        first_model = {at for at in firsts if self._slots[at][0] == 0}
        self._last = (0, models[0].layers - 1)
        starts = [FIRST_PASS if at in first_model else genome.start for at in range(len(self._slots))]
        included = [Gene(f"slot.{at}", start - SIGMAS, start + SIGMAS) for at, start in enumerate(starts) if at > 0]
        self.genes = (*included, *self._scale_genes(own))
        middles = {gene.name: gene.middle for gene in self.genes}
        outside = {f"slot.{at}": min(start, -1.0) for at, start in enumerate(starts) if at not in first_model}
        self.start: Values = middles | outside  # the first model as it is
        once = {f"slot.{at}": 1.0 if at in firsts else -1.0 for at in range(1, len(self._slots))}
        unscaled = {name: 1.0 for name in middles if name.startswith("scale.")}
        self.plain: Values = once | unscaled  # all layers of all models once

    def config(self, values: Values) -> str:
        return path_config(self.path(values), self._family, **self._genome.settings)

    def path(self, values: Values) -> LayerPath:
        """The slots that are part of the path, the first and the last always."""
        places = [at for at in range(len(self._slots)) if at == 0 or values[f"slot.{at}"] > 0]
        steps = [(at, *self._slots[at]) for at in places]
        if steps[-1][1:] != self._last:
            steps.append((len(self._slots), *self._last))
        path, before = [], None
        for at, model, layer in steps:
            path.append(Slot(self.models[model].name, layer, self._scale(before, (model, layer), at, values)))
            before = (model, layer)
        return tuple(path)

    def _scale(self, before: tuple[int, int] | None, here: tuple[int, int], at: int, values: Values) -> float:
        if before is None or _are_neighbours(before, here) or self._genome.scaling == "none":
            return 1.0
        return values[f"scale.{at}" if self._genome.scaling == "slots" else _pair_name(before, here)]

    def _scale_genes(self, own: Sequence[tuple[int, int]]) -> list[Gene]:
        low, high = self._genome.scaling_range
        if self._genome.scaling == "slots":
            return [Gene(f"scale.{at}", low, high) for at in range(1, len(self._slots) + 1)]
        if self._genome.scaling == "none":
            return []
        pairs = [(before, here) for before in own for here in own if not _are_neighbours(before, here)]
        if len(pairs) > MOST_PAIRS:
            raise InputError(
                f"genome.scaling: pairs means {len(pairs)} factors for {len(own)} layers; give scaling: slots, which "
                f"has {len(self._slots)}"
            )
        return [Gene(_pair_name(before, here), low, high) for before, here in pairs]


def _are_neighbours(before: tuple[int, int], here: tuple[int, int]) -> bool:
    return here == (before[0], before[1] + 1)


def _pair_name(before: tuple[int, int], here: tuple[int, int]) -> str:
    """Such as scale.0:5-1:2: from the first model's layer 5 to the second one's layer 2."""
    return f"scale.{before[0]}:{before[1]}-{here[0]}:{here[1]}"
