"""The model of a pretraining run: random at first, trained through blocks if asked to, and written at the end."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantlab.checkpoint import TensorEntry
from quantlab.checkpoint.families import Family, family_of
from quantlab.errors import InputError
from quantlab.formats import BlockFormat, Recipe
from quantlab.training.recipe_file import PretrainRecipe, Quantization, Schedule
from quantlab.training.tuning import LOG
from quantlab.training.vocabulary import BOS, EOS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

METHOD = "pretrain"


def new_model(recipe: PretrainRecipe, path: Path) -> PreTrainedModel:
    """The recipe's model with random weights, once it is known to compute; `path` is the recipe's, for errors."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(recipe.model)
    model_type = settings.pop("model_type")
    torch.manual_seed(recipe.schedule.seed)
    try:
        config = AutoConfig.for_model(
            model_type, vocab_size=recipe.vocabulary.size, bos_token_id=BOS, eos_token_id=EOS, **settings
        )
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            model(torch.tensor([[BOS]]))  # some shapes that do not fit each other show only now
    except Exception as error:  # what its classes do not check themselves fails anywhere in them
        raise InputError(f"{path}: model: transformers refuses it: {' '.join(str(error).split())}") from None
    _check_config(config, settings, recipe.schedule, path)
    return model


def _check_config(config: PreTrainedConfig, settings: dict[str, Any], schedule: Schedule, path: Path) -> None:
    """What transformers accepts without a word: misspelt fields, and windows longer than the model."""
    known = {field.name for field in dataclasses.fields(config)} | set(config.attribute_map)
    if unknown := sorted(name for name in settings if name not in known and hasattr(config, name)):
        raise InputError(f"{path}: model: unknown fields {', '.join(unknown)}; {type(config).__name__} has no such")
    longest, limit = max(schedule.context, schedule.short_context), config.max_position_embeddings
    if longest > limit:
        raise InputError(f"{path}: schedule.context {longest} exceeds model.max_position_embeddings, {limit}")


def train_through_blocks(model: PreTrainedModel, quantization: Quantization, path: Path) -> dict[str, BlockFormat]:
    """Let linear layers, and embedding and head if asked to, compute with the blocks that their weights round to.

    In place, on the device that will train. Returns the formats by tensor name.

    Raises:
        InputError: rows of a weight are no whole blocks; `path` is the recipe's, for errors.
    """
    import torch

    from quantlab.nn.swap import fake_quantize_modules

    family = _family(model, str(path))
    rules = _rules(family, quantization)
    formats = {}
    for name, parameter in model.named_parameters():
        format = rules.format_by_name(name)
        if format is None:
            continue
        rows, columns = parameter.shape[::-1] if family.is_transposed(name) else parameter.shape
        if not format.fits((rows, columns)):
            raise InputError(
                f"{path}: model: {name} has rows of {columns} weights, and a {format.name} block takes "
                f"{format.block_size}; choose sizes that it divides"
            )
        formats[name] = format
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    fake_quantize_modules(model, formats, activations=quantization.activations)
    return formats


def _rules(family: Family, quantization: Quantization) -> Recipe:
    vocabulary, linear = quantization.vocabulary_format, quantization.linear_format.name
    of_vocabulary = None if vocabulary is None else vocabulary.name
    kept = ((family.embedding, of_vocabulary), (family.head, of_vocabulary))
    return Recipe((*kept, *((pattern, linear) for pattern in family.linear)))


def _family(model: PreTrainedModel, where: str) -> Family:
    return family_of(json.loads(model.config.to_json_string()), where)


def round_unpacked(model: PreTrainedModel, formats: Mapping[str, BlockFormat]) -> None:
    """Round what is written as fp16 to it, so that the last evaluation is that of the written model."""
    import torch

    for name, parameter in model.named_parameters():
        if name not in formats:
            parameter.data = parameter.data.to(torch.float16).to(parameter.dtype)


def write_model(
    model: PreTrainedModel,
    recipe: PretrainRecipe,
    formats: Mapping[str, BlockFormat],
    tokenizer: Path,
    out: Path,
    history: list[dict[str, float]],
) -> None:
    """The folder, by the one writer, with tokenizer and loss log: blocks by `formats`, all else in fp16."""
    import torch

    from quantlab.checkpoint.folder_writer import FolderWriter

    model.config.dtype = torch.float16
    model.config.use_cache = True
    model.config.architectures = [type(model).__name__]
    config = json.loads(model.config.to_json_string())  # what differs from transformers' general defaults
    family = family_of(config, str(out))
    if recipe.quantization is not None:
        config["quantization_config"] = _quantization_config(family, recipe)
    tied = set(model.all_tied_weights_keys)
    weights = {name: p.detach().cpu() for name, p in model.named_parameters() if name not in tied}
    weights = {name: w.T if family.is_transposed(name) else w for name, w in weights.items()}
    entries = [_entry(name, tuple(w.shape), formats.get(name)) for name, w in weights.items()]
    with FolderWriter(out, entries, config) as writer:
        for name, weight in weights.items():
            if name in formats:
                layer = model.get_submodule(name.removesuffix(".weight"))
                writer.write_packed(name, layer.packed_weight())
            else:
                writer.write(name, weight.to(torch.float16))
        writer.copy_companions(tokenizer)
        generation = {"bos_token_id": BOS, "eos_token_id": EOS}
        writer.add_file("generation_config.json", json.dumps(generation, indent=2).encode() + b"\n")
        writer.add_file(LOG, json.dumps(history).encode())


def _quantization_config(family: Family, recipe: PretrainRecipe) -> dict[str, Any]:
    """What config.json tells of the blocks."""
    from importlib.metadata import version

    assert recipe.quantization is not None
    own = {"steps": recipe.schedule.steps, "stages": recipe.schedule.stages}
    made = {"method": METHOD, METHOD: own, "quantlab_version": version("quantlab")}
    return {**_rules(family, recipe.quantization).to_config(), **made}


def _entry(name: str, shape: tuple[int, ...], format: BlockFormat | None) -> TensorEntry:
    if format is None:
        return TensorEntry(name, "F16", shape)
    return TensorEntry(name, "U8", (shape[0], format.row_bytes(shape[1])))
