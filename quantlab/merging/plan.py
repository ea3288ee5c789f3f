"""From a merge config and its opened models to the plan of every tensor; all that does not fit is listed at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from quantlab.checkpoint.source import is_gguf
from quantlab.checkpoint.tensors import FLOAT_DTYPES
from quantlab.merging.agreement import check_configs, check_families
from quantlab.merging.chat_template import AUTO, chosen_template, missing_tokens, template_files
from quantlab.merging.config import MergeConfig, MergedModel
from quantlab.merging.faults import Faults
from quantlab.merging.layers import Place, arranged_config, lay_out
from quantlab.merging.plan_types import MergePlan, OpenedModel, TensorPlan
from quantlab.merging.references import ModelReference
from quantlab.merging.tensor_parameters import ParameterFinder
from quantlab.merging.tensor_parts import PartFinder, PlannedParts
from quantlab.merging.united_files import united_files
from quantlab.merging.vocabulary import Alignment, align

if TYPE_CHECKING:
    from quantlab.merging.methods.method import MergeMethod

ORDERED = ("slerp",)  # methods that go from their first model to their second
_CONFIG_TYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def plan_merge(config: MergeConfig, opened: Mapping[ModelReference, OpenedModel]) -> MergePlan:
    """Plan a merge.

    Args:
        opened: a model for each of `config.references`.

    Raises:
        InputError: `MergeError` with all that does not fit, and what resolves it.
    """
    return _Planner(config, opened).plan()


class _Planner:
    def __init__(self, config: MergeConfig, opened: Mapping[ModelReference, OpenedModel]) -> None:
        from quantlab.merging.methods.table import METHODS

        self._method: MergeMethod = METHODS[config.method]
        self._config = _with_first_model(config)
        self._opened = opened
        self._faults = Faults(config.source)
        self._notes = list(config.notes)
        self._bases = [piece.base or config.base for piece in config.slices] or [config.base]
        is_asked = any(base is not None for base in self._bases)
        self._uses_base = self._method.base == "required" or (self._method.base == "optional" and is_asked)

    def plan(self) -> MergePlan:
        config, faults = self._config, self._faults
        if self._method.base == "required" and None in self._bases:
            faults.add(f"{config.method} merges differences from a base, and there is none", "name it as base_model")
        faults.check()
        named = _models_of(config, self._uses_base)
        check_families(named, self._opened, faults)
        faults.check()
        primary = config.base if config.base is not None and config.base in named else named[0]
        ordered = list(dict.fromkeys([primary, *named]))
        check_configs(ordered, self._opened, faults, self._notes)
        places = lay_out(config, self._opened, self._uses_base, faults)
        self._note_parameters_of_base()
        ends = dict.fromkeys(model.reference for place in (places[0], places[-1]) for model in place.models)
        alignment = align(list(ends), config.base, config.tokenizer, self._opened, faults, self._notes)
        tensors = self._tensors(places, alignment)
        output = self._output_config(primary, places, alignment, tensors)
        files = self._files(alignment)
        self._note_slices(places)
        faults.check()
        return MergePlan(
            config=output,
            tensors=tensors,
            companions=alignment.companions,
            vocabulary=alignment.vocabulary,
            files=files,
            notes=tuple(dict.fromkeys(self._notes)),
        )

    def _tensors(self, places: Sequence[Place], alignment: Alignment) -> tuple[TensorPlan, ...]:
        finder = PartFinder(places, self._opened, alignment, self._config.zero_biases, self._faults)
        parameters = ParameterFinder(self._config, self._method, self._faults, self._notes)
        tensors = []
        for place in places:
            for planned in finder.parts(place):
                tensors.append(self._tensor(place, planned, parameters))
        finder.report()
        parameters.report([tensor.name for tensor in tensors])
        return tuple(tensors)

    def _tensor(self, place: Place, planned: PlannedParts, parameters: ParameterFinder) -> TensorPlan:
        dtype = self._dtype(planned)
        tensor = TensorPlan(
            name=planned.name,
            shape=planned.shape,
            dtype=dtype,
            method=self._config.method,
            base=planned.base,
            parts=planned.parts,
            parameters=parameters.values(place, planned.name),
            overrides=planned.overrides,
        )
        if dtype in FLOAT_DTYPES:
            return tensor
        self._notes.append(f"{planned.name} holds {dtype}, no weights; it is copied")
        kept = planned.base or planned.parts[0]
        return replace(tensor, method="passthrough", base=None, parts=(kept,), parameters={}, overrides=())

    def _dtype(self, planned: PlannedParts) -> str:
        """The element type of the output; that of the input where it holds no floats."""
        parts = planned.parts if planned.base is None else (planned.base, *planned.parts)
        part = next(part for part in parts if not part.zeros)
        checkpoint = self._opened[part.model].checkpoint
        stored, is_packed = checkpoint.entry(part.name).dtype, checkpoint.format(part.name) is not None
        if not is_packed and stored not in FLOAT_DTYPES:
            if stored.startswith("F8"):
                self._faults.add(
                    f"{part.model}: {part.name} holds {stored}", "convert it to a type that is computed with"
                )
            return stored
        if self._config.dtype is not None:
            return self._config.dtype
        if is_packed or is_gguf(checkpoint.path):  # which keeps vectors in fp32, whatever the model's type is
            return _CONFIG_TYPES.get(str(checkpoint.config.get("dtype", checkpoint.config.get("torch_dtype"))), "F32")
        return stored

    def _output_config(
        self, primary: ModelReference, places: Sequence[Place], alignment: Alignment, tensors: Sequence[TensorPlan]
    ) -> dict[str, Any]:
        """config.json: the base's or first model's, with what the merge changes."""
        model = self._opened[primary]
        output = arranged_config(model.config, places, self._opened, self._faults)
        output.pop("quantization_config", None)
        family, names = model.family, {tensor.name: tensor for tensor in tensors}
        output["tie_word_embeddings"] = family.head not in names
        if family.embedding in names:
            output["vocab_size"] = names[family.embedding].shape[0]
        if alignment.companions != primary:
            theirs = self._opened[alignment.companions].config
            output |= {key: theirs[key] for key in _SPECIAL_TOKENS if key in theirs}
        output |= _bias_flags(names, model.config)
        if len(found := {tensor.dtype for tensor in tensors if tensor.dtype in FLOAT_DTYPES}) == 1:
            word = next((name for name, short in _CONFIG_TYPES.items() if short in found), None)
            output |= {} if word is None else {"torch_dtype" if "torch_dtype" in output else "dtype": word}
        return output

    def _files(self, alignment: Alignment) -> dict[str, bytes | None]:
        companion = self._opened[alignment.companions].checkpoint
        files: dict[str, bytes | None] = {}
        if alignment.is_united and alignment.vocabulary is not None:
            files |= united_files(alignment.vocabulary, companion)
        setting = self._config.chat_template
        models = list(dict.fromkeys([alignment.companions, *_models_of(self._config, self._uses_base)]))
        checkpoints = [self._opened[model].checkpoint for model in models]
        template = chosen_template(setting or AUTO, checkpoints)
        if setting is None:
            if template is not None and chosen_template(AUTO, checkpoints[:1]) is None:
                self._notes.append("the output has no chat template, others of the models have: chat_template: auto")
            return files
        if template is None:
            self._notes.append("chat_template: auto: none of the models has one")
            return files
        if missing := missing_tokens(template, alignment.known):
            self._notes.append(f"the chat template writes {', '.join(missing)}, no tokens of the output's")
        return files | template_files(template, companion, files.get("tokenizer_config.json"))

    def _note_parameters_of_base(self) -> None:
        listed = [(self._config.base, self._config.models)]
        listed += [(piece.base or self._config.base, piece.sources) for piece in self._config.slices]
        for base, models in listed:
            if self._uses_base and any(model.parameters for model in models if model.reference == base):
                self._notes.append(f"parameters of {base} count for nothing: it is the base, and has no delta")

    def _note_slices(self, places: Sequence[Place]) -> None:
        first, last = places[0], places[-1]
        if [model.reference for model in first.models] != [model.reference for model in last.models]:
            self._notes.append(
                "embeddings are merged of the first slice's models, the last norm and a head of its own of the last's"
            )


_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def _with_first_model(config: MergeConfig) -> MergeConfig:
    """For a method that goes from a first model to a second, with the base in the first place."""
    base = config.base
    if config.method not in ORDERED or base is None:
        return config
    slices = [replace(piece, sources=_first(piece.base or base, piece.sources)) for piece in config.slices]
    models = _first(base, config.models)
    if len(models) == 1 and models[0].reference != base:
        models = (MergedModel(base), *models)
    return replace(config, models=models, slices=tuple(slices))


def _first(base: ModelReference, models: tuple[MergedModel, ...]) -> tuple[MergedModel, ...]:
    return tuple(sorted(models, key=lambda model: model.reference != base))


def _models_of(config: MergeConfig, uses_base: bool) -> list[ModelReference]:
    """All models that weights come from, each once, in the config's order; the bases of deltas among them."""
    found: list[ModelReference | None] = [config.base] if uses_base else []
    found += [model.reference for model in config.models]
    for piece in config.slices:
        found += [piece.base] if uses_base else []
        found += [model.reference for model in piece.sources]
    return list(dict.fromkeys(reference for reference in found if reference is not None))


def _bias_flags(names: Mapping[str, TensorPlan], config: Mapping[str, Any]) -> dict[str, bool]:
    """Llama's two flags, where zeros stand for biases that the first model lacks."""
    flags = {}
    for key, part in (("attention_bias", ".self_attn.q_proj.bias"), ("mlp_bias", ".mlp.up_proj.bias")):
        if config.get("model_type") == "llama" and any(name.endswith(part) for name in names) != bool(config.get(key)):
            flags[key] = not config.get(key)
    return flags
