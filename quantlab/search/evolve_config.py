"""What `quantlab evolve` reads: which models, what is searched, and what the outcome is judged by; mergekit's words
where it has them, below `genome`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from quantlab.errors import InputError
from quantlab.merging.faults import Faults, nearest
from quantlab.merging.yaml_lines import Node, read_yaml
from quantlab.search.fitness import DEFAULT_CONTEXT, Term

Range = tuple[float, float]
SPACES = ("parameters", "layers", "both")
SCALINGS = ("pairs", "slots", "none")
ORDERS = ("depth", "passes")
MOST_BYTES = 1_000_000  # of a config file
KEYS = ("genome", "fitness", "test")
SETTINGS = ("dtype", "out_dtype", "tokenizer", "tokenizer_source", "chat_template", "missing_biases")
GENOME_KEYS = (
    "models", "base_model", "merge_method", "layer_granularity", "normalize", "allow_negative_weights", "parameters",
    "ranges", "space", "order", "repetitions", "scaling", "scaling_range", "start", "partner", *SETTINGS,
)  # fmt: skip
TERM_KEYS = ("loss", "task", "call", "weight", "context", "limit", "max_tokens")


@dataclass(frozen=True)
class Genome:
    """What is searched, among which models.

    Attributes:
        models: as merge configs name them; the first is the one that layer paths begin and end with.
        space: "parameters" of a merge method, "layers" (paths through the models' layers), or "both", one after the
            other: paths through the best merge and one of the models.
        ranges: of searched parameters that are not to have the usual one; see `genome.ParameterSpace`.
        group: layers that share values (`layer_granularity`); None: all do.
        fixed: parameters of the method that are not searched.
        settings: further keys of the merge configs.
        order: of the layers that a path takes or leaves out: by "depth" (every model's first layer, then every second
            one), or in "passes", one model after the other.
        repetitions: how often each layer may be part of a path.
        scaling: a factor for every pair of layers that a path may make neighbours, or for every place, or none.
        scaling_range: of these factors.
        start: where layers start that are no part of the first model's first pass, in standard deviations; above 0 a
            layer is part of the path.
        partner: the model that the best merge goes together with; None: the best one.
    """

    models: tuple[str, ...]
    base: str | None = None
    method: str | None = None
    space: Literal["parameters", "layers", "both"] = "parameters"
    ranges: Mapping[str, Range] = field(default_factory=dict)
    group: int | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    order: Literal["depth", "passes"] = "depth"
    repetitions: int = 2
    scaling: Literal["pairs", "slots", "none"] = "pairs"
    scaling_range: Range = (0.5, 1.5)
    start: float = -1.5
    partner: str | None = None


@dataclass(frozen=True)
class EvolveConfig:
    """A whole request; `fitness` is what the search sees, `test` judges the outcome."""

    genome: Genome
    fitness: tuple[Term, ...]
    test: tuple[Term, ...] = ()
    source: str = "the evolve config"


def read_evolve_config(source: str | Path) -> EvolveConfig:
    """Read and check a config, in itself.

    Args:
        source: a file, or the YAML text itself: a `str` of more than one line.

    Raises:
        InputError: no YAML, or all that is wrong in it, by line and key.
    """
    from quantlab.checkpoint.positioned import read_whole

    if isinstance(source, str) and "\n" in source:
        return _Reader(source, "the evolve config").config()
    path = Path(source)
    try:
        return _Reader(read_whole(path, MOST_BYTES).decode("utf-8"), str(path)).config()
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text; give the YAML file of a search") from None


class _Reader:
    def __init__(self, text: str, source: str) -> None:
        self._root, self._source = read_yaml(text, source), source
        self._faults = Faults(source)

    def config(self) -> EvolveConfig:
        if isinstance(self._root.value, dict) and "tasks" in self._root.value:
            self._faults.add(
                "tasks: are lm-eval's, which this search does not run", "name files of your own as fitness"
            )
        top = self._entries(self._root, (*KEYS, "tasks"))
        for key in ("genome", "fitness"):
            if key not in top:
                self._faults.add(f"{key} is missing")
        genome = self._genome(top["genome"]) if "genome" in top else Genome(())
        fitness, test = self._terms(top.get("fitness")), self._terms(top.get("test"))
        self._faults.check()
        return EvolveConfig(genome, fitness, test, self._source)

    def _genome(self, node: Node) -> Genome:
        entries = self._entries(node, GENOME_KEYS)

        def read(key: str, reader: Callable[[Node], Any], default: Any) -> Any:  # Any: of the key's own type
            found = entries.get(key)
            value = None if found is None or found.value is None else reader(found)
            return default if value is None else value

        genome = Genome(
            models=read("models", self._names, ()),
            base=read("base_model", self._text, None),
            method=read("merge_method", self._text, None),
            space=read("space", self._word(SPACES), "parameters"),
            ranges=self._ranges(entries),
            group=read("layer_granularity", self._whole, None) or None,
            fixed=self._fixed(entries),
            settings={key: _plain(entries[key]) for key in SETTINGS if key in entries},
            order=read("order", self._word(ORDERS), Genome.order),
            repetitions=read("repetitions", self._whole, Genome.repetitions),
            scaling=read("scaling", self._word(SCALINGS), Genome.scaling),
            scaling_range=read("scaling_range", self._range, Genome.scaling_range),
            start=read("start", self._number, Genome.start),
            partner=read("partner", self._text, None),
        )
        self._check(genome, entries)
        return genome

    def _check(self, genome: Genome, entries: Mapping[str, Node]) -> None:
        add = self._faults.add
        if not genome.models:
            add("genome.models is missing", "list the models: models: [path_or_repo, ...]")
        if len(set(genome.models)) < len(genome.models):
            add("genome.models names a model twice")
        if genome.base is not None and genome.base in genome.models:
            add(f"genome.base_model {genome.base} is among the models", "list it once")
        if genome.space != "layers" and genome.method is None:
            add("genome.merge_method is missing", "name the method whose parameters are searched")
        if genome.partner is not None and genome.partner not in genome.models:
            add(f"genome.partner {genome.partner} is none of the models")
        if not 1 <= genome.repetitions <= 16:
            add(f"genome.repetitions {genome.repetitions}: must be from 1 to 16")
        if genome.scaling_range[0] <= 0:
            add(f"genome.scaling_range {list(genome.scaling_range)}: must be above 0")
        if not -2.5 <= genome.start <= 2.5:
            add(f"genome.start {genome.start:g}: must be from -2.5 to 2.5 standard deviations")
        unused: dict[str, tuple[str, ...]] = {
            "parameters": ("order", "repetitions", "scaling", "scaling_range", "start", "partner")
        }
        unused["layers"] = (
            "layer_granularity",
            "normalize",
            "allow_negative_weights",
            "parameters",
            "ranges",
            "partner",
        )
        for key in unused.get(genome.space, ()):
            if key in entries:
                add(f"{entries[key]}: has no effect with space: {genome.space}", "leave it out")

    def _fixed(self, entries: Mapping[str, Node]) -> dict[str, Any]:
        fixed = {key: _plain(node) for key, node in self._optional(entries.get("parameters")).items()}
        if "normalize" in entries:
            fixed["normalize"] = entries["normalize"].value
        return fixed

    def _ranges(self, entries: Mapping[str, Node]) -> dict[str, Range]:
        found = {}
        negative = entries.get("allow_negative_weights")
        if negative is not None and negative.value:
            found["weight"] = (-0.5, 1.5)  # starts in the middle, as without
        for name, node in self._optional(entries.get("ranges")).items():
            if (bounds := self._range(node)) is not None:
                found[name] = bounds
        return found

    # -- fitness

    def _terms(self, node: Node | None) -> tuple[Term, ...]:
        if node is None:
            return ()
        items = node.value if isinstance(node.value, list) else [node]
        if not items:
            self._faults.add(f"{node}: is an empty list")
        read = [self._term(item) for item in items]
        return tuple(term for term in read if term is not None)

    def _term(self, node: Node) -> Term | None:
        entries = self._entries(node, TERM_KEYS)
        kinds = [key for key in ("loss", "task", "call") if key in entries]
        if len(kinds) != 1:
            way_out = "write {loss: text file}, {task: jsonl file} or {call: 'module:function'}"
            self._faults.add(f"{node}: names {'nothing' if not kinds else ' and '.join(kinds)} to score by", way_out)
            return None
        (kind,) = kinds
        for key in ({"context"} if kind != "loss" else set()) | ({"limit", "max_tokens"} if kind != "task" else set()):
            if key in entries:
                self._faults.add(f"{entries[key]}: has no effect on {kind}", "leave it out")
        source = self._text(entries[kind])
        if source is None:
            return None
        if kind == "call" and not all(source.rpartition(":")[::2]):
            self._faults.add(f"{entries[kind]}: {source!r} is no function", "write module:function or file.py:function")
        context, limit, most = (
            None if key not in entries else self._whole(entries[key]) for key in ("context", "limit", "max_tokens")
        )
        context = DEFAULT_CONTEXT if context is None else context
        weight = self._number(entries["weight"]) if "weight" in entries else 1.0
        return Term(kind, source, 1.0 if weight is None else weight, context, limit, most)

    # -- shapes of YAML

    def _entries(self, node: Node, known: tuple[str, ...]) -> dict[str, Node]:
        if not isinstance(node.value, dict):
            self._faults.add(f"{node}: is no mapping with keys such as {', '.join(known[:3])}")
            return {}
        for key in node.value.keys() - set(known):
            self._faults.add(f"{node.value[key]}: {key!r} is no key here", nearest(key, known))
        return {key: each for key, each in node.value.items() if key in known}

    def _optional(self, node: Node | None) -> dict[str, Node]:
        if node is None or node.value is None:
            return {}
        if isinstance(node.value, dict):
            return node.value
        self._faults.add(f"{node}: is no mapping of parameters")
        return {}

    def _names(self, node: Node) -> tuple[str, ...] | None:
        if not isinstance(node.value, list):
            self._faults.add(f"{node}: is no list of models")
            return None
        return tuple(name for item in node.value if (name := self._text(item)) is not None)

    def _text(self, node: Node) -> str | None:
        if isinstance(node.value, str) and node.value:
            return node.value
        self._faults.add(f"{node}: {_shown(node.value)} is no text")
        return None

    def _number(self, node: Node) -> float | None:
        try:
            number = math.nan if isinstance(node.value, bool | list | dict | None) else float(node.value)
        except ValueError:
            number = math.nan
        if math.isfinite(number):
            return number
        self._faults.add(f"{node}: {_shown(node.value)} is no number")
        return None

    def _whole(self, node: Node) -> int | None:
        if type(node.value) is int and node.value >= 0:
            return node.value
        self._faults.add(f"{node}: {_shown(node.value)} is no whole number")
        return None

    def _range(self, node: Node) -> Range | None:
        items = node.value if isinstance(node.value, list) else []
        numbers = [number for item in items if (number := self._number(item)) is not None]
        if len(items) == len(numbers) == 2 and numbers[0] < numbers[1]:
            return numbers[0], numbers[1]
        self._faults.add(f"{node}: is no range", "write [least, most]")
        return None

    def _word(self, known: Iterable[str]) -> Callable[[Node], str | None]:
        def read(node: Node) -> str | None:
            if isinstance(node.value, str) and node.value in known:
                return node.value
            self._faults.add(f"{node}: {_shown(node.value)} is not known", nearest(str(node.value), known))
            return None

        return read


def _plain(node: Node) -> Any:
    """The value without its lines."""
    if isinstance(node.value, dict):
        return {key: _plain(each) for key, each in node.value.items()}
    return [_plain(each) for each in node.value] if isinstance(node.value, list) else node.value


def _shown(value: object) -> str:
    return "a mapping" if isinstance(value, dict) else "a list" if isinstance(value, list) else repr(value)
