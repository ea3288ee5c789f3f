"""From the YAML tree of a merge config to `MergeConfig`; whatever is wrong is collected on the way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from quantlab.checkpoint.chat_text import check_template
from quantlab.errors import InputError
from quantlab.merging.chat_template import AUTO, TEMPLATES, is_template
from quantlab.merging.config import MergeConfig, MergedModel, Slice, TokenizerSettings, TokenSource
from quantlab.merging.faults import Faults, nearest
from quantlab.merging.parameter_reader import ParameterReader
from quantlab.merging.references import ModelReference, parse_reference
from quantlab.merging.yaml_lines import Node, read_yaml

INPUTS = ("models", "slices", "modules")
KEYS = (
    "merge_method", *INPUTS, "base_model", "parameters", "dtype", "out_dtype", "tokenizer", "tokenizer_source",
    "chat_template", "missing_biases",
)  # fmt: skip
OUTPUT_TYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
MODEL_SHAPE = "write path_or_repo[@revision][+adapter]"
ZERO, REFUSE = "zero", "refuse"


class ConfigReader:
    """Reads one config; `source` is the file that errors name."""

    def __init__(self, text: str, source: str) -> None:
        self._text, self._source = text, source
        self._faults, self._notes = Faults(source), list[str]()

    def config(self) -> MergeConfig:
        """The config.

        Raises:
            InputError: no YAML, or `MergeError`.
        """
        root = read_yaml(self._text, self._source)
        if not isinstance(root.value, dict):
            raise InputError(f"{self._source}: is no mapping of keys such as merge_method and models")
        top = self._keys(root, KEYS)
        inputs = self._inputs(top, root)
        method = self._method(top.get("merge_method"))
        parameters = ParameterReader(method, self._faults, self._notes)
        config = MergeConfig(
            method=method or "",
            models=self._models(inputs.get("models"), parameters),
            slices=self._slices(inputs.get("slices"), parameters),
            base=self._reference(top.get("base_model")),
            parameters=parameters.read(top.get("parameters")),
            dtype=self._dtype(top),
            tokenizer=self._tokenizer(top),
            chat_template=self._chat_template(top.get("chat_template")),
            zero_biases=self._word(top.get("missing_biases"), (REFUSE, ZERO)) == ZERO,
            text=self._text,
            source=self._source,
        )
        self._faults.check()
        return replace(config, notes=tuple(dict.fromkeys(self._notes)))

    # -- the parts

    def _method(self, node: Node | None) -> str | None:
        from quantlab.merging.methods.table import METHODS

        if node is None or node.value is None:
            self._faults.add("merge_method is missing", f"name one of {', '.join(METHODS)}")
            return None
        return self._word(node, METHODS)

    def _inputs(self, top: Mapping[str, Node], root: Node) -> Mapping[str, Node]:
        """`models` or `slices`, which may lie below the only one of `modules`."""
        given = [key for key in INPUTS if key in top]
        if len(given) != 1:
            found = f"both {' and '.join(given)}" if given else "none of them"
            self._faults.add(f"{root}: exactly one of {', '.join(INPUTS)} is expected, and there is {found}")
            return {}
        if given != ["modules"]:
            return top
        modules = self._mapping(top["modules"])
        if len(modules) != 1:
            way_out = "a text model is one module: give its models or slices alone"
            self._faults.add(f"{top['modules']}: {len(modules)} modules ({', '.join(modules)})", way_out)
            return {}
        (module,) = modules.values()
        inner = self._keys(module, ("models", "slices")) if isinstance(module.value, dict) else {}
        if len(inner) != 1:
            self._faults.add(f"{module}: either models or slices is expected below it")
            return {}
        return inner

    def _models(self, node: Node | None, parameters: ParameterReader) -> tuple[MergedModel, ...]:
        return self._merged(node, ("model", "parameters"), parameters)

    def _slices(self, node: Node | None, parameters: ParameterReader) -> tuple[Slice, ...]:
        slices = []
        for item in self._list(node):
            entry = self._keys(item, ("sources", "base_model", "parameters", "residual_weight"))
            if "sources" not in entry:
                self._faults.add(f"{item}: names no sources", "list them: sources: [{model: ..., layer_range: [0, 8]}]")
            if "residual_weight" in entry:
                self._faults.add(f"{entry['residual_weight']}: is not supported", "leave it out")
            sources = self._merged(entry.get("sources"), ("model", "layer_range", "parameters"), parameters)
            slices.append(
                Slice(sources, parameters.read(entry.get("parameters")), self._reference(entry.get("base_model")))
            )
        return tuple(slices)

    def _merged(self, node: Node | None, keys: tuple[str, ...], parameters: ParameterReader) -> tuple[MergedModel, ...]:
        found = []
        for item in self._list(node):
            entry = self._keys(item, keys, below_parameters=parameters.names)
            reference = self._reference(entry.get("model"))
            if "model" not in entry and isinstance(item.value, dict):
                self._faults.add(f"{item}: names no model", MODEL_SHAPE)
            if reference is not None:
                own = parameters.read(entry.get("parameters"), of_model=True)
                found.append(MergedModel(reference, own, self._layers(entry.get("layer_range"))))
        return tuple(found)

    def _layers(self, node: Node | None) -> tuple[int, int] | None:
        if node is None:
            return None
        numbers = [each.value for each in node.value] if isinstance(node.value, list) else []
        if len(numbers) != 2 or not all(type(n) is int for n in numbers) or not 0 <= numbers[0] < numbers[1]:
            self._faults.add(f"{node}: is no range of layers", "write [first, last], the last one not included")
            return None
        return numbers[0], numbers[1]

    def _reference(self, node: Node | None) -> ModelReference | None:
        if node is None or node.value is None:
            return None
        value = node.value
        try:
            if isinstance(value, str):
                return parse_reference(value)
            if isinstance(value, dict) and "model" in value:
                return self._long_reference(node)
        except InputError as error:
            self._faults.add(f"{node}: {error}")
            return None
        self._faults.add(f"{node}: is no model", MODEL_SHAPE)
        return None

    def _long_reference(self, node: Node) -> ModelReference:
        """mergekit's long form: {model: {path, revision}, lora: {path, revision}}."""
        entry = self._keys(node, ("model", "lora"))
        model = self._path(entry["model"])
        adapter = self._path(entry["lora"]) if "lora" in entry else (None, None)
        return ModelReference(model[0] or "", model[1], *adapter)

    def _path(self, node: Node) -> tuple[str | None, str | None]:
        if node.value is None:
            return None, None
        if isinstance(node.value, str):
            return node.value, None
        entry = self._keys(node, ("path", "revision"))
        path, revision = (entry[key].value if key in entry else None for key in ("path", "revision"))
        if not isinstance(path, str) or not path:
            raise InputError(f"names no path; {MODEL_SHAPE}")
        return path, None if revision is None else str(revision)

    def _dtype(self, top: Mapping[str, Node]) -> str | None:
        """The output's type; arithmetic is in float32 whatever `dtype` says, so that it only counts as the output's."""
        words = {key: self._word(top.get(key), OUTPUT_TYPES) for key in ("dtype", "out_dtype")}
        word = words["out_dtype"] or words["dtype"]
        return None if word is None else OUTPUT_TYPES[word]

    def _chat_template(self, node: Node | None) -> str | None:
        if node is None or node.value is None:
            return None
        if isinstance(node.value, str) and node.value in (AUTO, *TEMPLATES):
            return node.value
        if isinstance(node.value, str) and is_template(node.value):
            try:
                check_template(node.value, str(node))
            except InputError as error:
                self._faults.add(str(error))
            return node.value
        hint = nearest(str(node.value), (AUTO, *TEMPLATES))
        self._faults.add(f"{node}: {node.value!r} is neither the name of a chat template nor Jinja text", hint)
        return None

    # -- tokenizers

    def _tokenizer(self, top: Mapping[str, Node]) -> TokenizerSettings | None:
        old, new = top.get("tokenizer_source"), top.get("tokenizer")
        if old is not None and new is not None:
            self._faults.add(f"{old}: tokenizer is there too", "keep tokenizer: {source: ...}")
            return None
        if old is not None:
            only = self._vocabulary(old)
            return None if only is None else TokenizerSettings(only)
        if new is None or new.value is None:
            return None
        entry = self._keys(new, ("source", "tokens", "pad_to_multiple_of"))
        source: Any = self._vocabulary(entry["source"]) if "source" in entry else "union"
        tokens = self._mapping(entry["tokens"]) if "tokens" in entry else {}
        read = {token: self._token(node) for token, node in tokens.items()}
        return TokenizerSettings(
            source or "union",
            {token: each for token, each in read.items() if each is not None},
            self._multiple(entry.get("pad_to_multiple_of")),
        )

    def _vocabulary(self, node: Node) -> Any:  # Any: "union", "base" or a reference; None where it is none of them
        value = node.value
        if value in ("union", "base"):
            return value
        if isinstance(value, str) and value.startswith("model:"):  # an older spelling
            return self._reference(Node(value.removeprefix("model:"), node.line, node.path))
        if value is None:
            self._faults.add(f"{node}: names no vocabulary", "write union, base, or one of the models")
        return self._reference(node)

    def _multiple(self, node: Node | None) -> int:
        if node is None or node.value is None:
            return 1
        if type(node.value) is not int or not 1 <= node.value <= 1 << 20:
            self._faults.add(f"{node}: is {node.value!r} instead of a whole number, such as 64")
            return 1
        return int(node.value)

    def _token(self, node: Node) -> TokenSource | None:
        entry = self._keys(node, ("source", "force"))
        force = entry["force"].value if "force" in entry else False
        if type(force) is not bool:
            self._faults.add(f"{entry['force']}: is {force!r} instead of true or false")
        if "source" not in entry:
            self._faults.add(f"{node}: names no source", "give a model, {kind: zero} or {kind: model_token, ...}")
            return None
        source = entry["source"]
        if not isinstance(source.value, dict) or "kind" not in source.value:
            model = self._reference(source)
            return None if model is None else TokenSource(model, None, bool(force))
        return self._token_kind(source, bool(force))

    def _token_kind(self, node: Node, force: bool) -> TokenSource | None:
        entry = self._keys(node, ("kind", "model", "token", "token_id"))
        kind = self._word(entry["kind"], ("zero", "model_token"))
        if kind == "zero":
            return TokenSource(None, None, force)
        model = self._reference(entry.get("model"))
        given = [entry[key].value for key in ("token", "token_id") if key in entry]
        if kind is None or model is None or len(given) != 1 or type(given[0]) not in (str, int):
            self._faults.add(f"{node}: is no token of a model", "write {kind: model_token, model: ..., token: ...}")
            return None
        return TokenSource(model, given[0], force)

    # -- shapes of YAML

    def _keys(self, node: Node, known: tuple[str, ...], below_parameters: Iterable[str] = ()) -> dict[str, Node]:
        """The entries of a mapping, without those that nobody knows, which are faults."""
        entries = self._mapping(node)
        for key in entries.keys() - set(known):
            own = key in below_parameters
            way_out = f"move it below parameters: {{{key}: ...}}" if own else nearest(key, known)
            self._faults.add(f"line {entries[key].line}: {entries[key].path}: {key!r} is no key here", way_out)
        return {key: each for key, each in entries.items() if key in known}

    def _mapping(self, node: Node) -> dict[str, Node]:
        if isinstance(node.value, dict):
            return node.value
        self._faults.add(f"{node}: is {_kind(node.value)} instead of a mapping")
        return {}

    def _list(self, node: Node | None) -> list[Node]:
        if node is None:
            return []
        if isinstance(node.value, list) and node.value:
            return node.value
        self._faults.add(f"{node}: is {_kind(node.value)} instead of a list with something in it")
        return []

    def _word(self, node: Node | None, known: Iterable[str]) -> str | None:
        if node is None or node.value is None:
            return None
        if isinstance(node.value, str) and node.value in known:
            return node.value
        self._faults.add(f"{node}: {node.value!r} is not known", nearest(str(node.value), known))
        return None


def _kind(value: object) -> str:
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "an empty list" if not value else "a list"
    return repr(value)
