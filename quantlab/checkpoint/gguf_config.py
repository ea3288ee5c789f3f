"""config.json and GGUF's architecture metadata, each from the other.

What llama.cpp would compute differently is refused here, before a file is written. Where only texts beyond a certain
length differ, or a rounding, the file is written and a note says so. The whole config lies in the file too, under a key
of our own, so that the way back is exact; it counts as long as the metadata still says the same.

Facts: https://github.com/ggml-org/llama.cpp, conversion/*.py (what its converter writes), src/llama-model.cpp and
src/models/*.cpp (what its loader reads and what its graphs have built in).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from quantlab.checkpoint.checked_values import CheckedValues
from quantlab.checkpoint.families import family_of
from quantlab.checkpoint.gguf_architectures import ROWS
from quantlab.checkpoint.gguf_details import WINDOW, Draft, Found
from quantlab.checkpoint.gguf_sizes import Shapes, sizes_of_config, sizes_of_gguf
from quantlab.checkpoint.rope import ROPE_TENSORS
from quantlab.errors import InputError

CONFIG_KEY = "quantlab.config"
NEUTRAL = {"expert_count": 0, "nextn_predict_layers": 0, "attention.causal": True}  # with others: another model


@dataclass(frozen=True)
class GgufConfig:
    """What a GGUF file says of a model's architecture.

    Attributes:
        metadata: full keys; a bool, int (uint32), float (float32), str, or a list of bools.
        tensors: fp32 tensors that belong to no layer: the divisors of a stretched rotary embedding.
        notes: one line each on what llama.cpp computes a little differently.
    """

    metadata: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def metadata_of(config: Mapping[str, Any], rows: int, source: str) -> GgufConfig:
    """Turn a config.json into GGUF metadata.

    Args:
        config: as read from JSON; missing keys take transformers' defaults.
        rows: of the embedding, which may be more than the tokenizer's tokens.
        source: config.json's path, for errors.

    Raises:
        InputError: a value is wrong, or llama.cpp would compute something else.
    """
    row = ROWS[family_of(dict(config), source).model_type]
    values = row.config_values(config, source)
    draft = Draft(row, values, sizes_of_config(row, values))
    draft.fill()
    metadata: dict[str, Any] = {"general.architecture": row.architecture, CONFIG_KEY: _canonical(config, source)}
    metadata |= {f"{row.architecture}.{key}": value for key, value in draft.metadata.items()}
    metadata[f"{row.architecture}.vocab_size"] = rows
    return GgufConfig(metadata, draft.tensors, tuple(draft.notes))


def config_of(
    metadata: Mapping[str, Any], shapes: Shapes, read: Callable[[str], np.ndarray], source: str
) -> dict[str, Any]:
    """Turn GGUF metadata into a config.json: the one that it came from, if the file still says so, or one like it.

    Args:
        metadata: of the file.
        shapes: of all its tensors, rows first.
        read: the fp32 values of a tensor, by name; asked for a rotary embedding's divisors only.
        source: the file's path, for errors.

    Raises:
        InputError: an architecture that quantlab does not read, or metadata that is missing, wrong, at odds with the
            tensors, or of a model that transformers does not have.
    """
    architecture = metadata.get("general.architecture")
    known = list(dict.fromkeys(row.architecture for row in ROWS.values()))
    if not isinstance(architecture, str) or architecture not in known:
        raise InputError(f"{source}: general.architecture is {architecture!r}; supported: {', '.join(known)}")
    values = CheckedValues(metadata, source, prefix=f"{architecture}.", way_out="convert the model again")
    row = next(row for row in ROWS.values() if row.architecture == architecture)
    if architecture == "llama" and values.integer(WINDOW, 0, least=0):
        row = ROWS["mistral"]
    for key, neutral in NEUTRAL.items():
        if not _same(values.get(key, neutral), neutral):
            raise values.refusal(key, str(neutral).lower(), "quantlab reads no such models")
    found = Found(row, values, sizes_of_gguf(row, values, shapes), shapes, read)
    return _stored_config(metadata, found) or found.config(metadata)


def _canonical(config: Mapping[str, Any], source: str) -> str:
    kept = {key: value for key, value in config.items() if key != "quantization_config"}
    try:
        return json.dumps(kept, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise InputError(f"{source}: holds something that JSON has not, such as NaN; mend config.json") from None


def _stored_config(metadata: Mapping[str, Any], found: Found) -> dict[str, Any] | None:
    """The config that the file was written from, unless somebody changed one of them."""
    stored = _parsed(metadata.get(CONFIG_KEY))
    if stored is None:
        return None
    try:
        made = metadata_of(stored, found.rows, found.values.source)
    except InputError:
        return None
    values = ROWS[stored["model_type"]].config_values(stored, found.values.source)
    if not _says(metadata, found, made) or any(values.get(key, False) != has for key, has in found.biases().items()):
        return None
    stored.pop("quantization_config", None)
    tied = values.get("tie_word_embeddings") is True or "output.weight" not in found.shapes
    return stored | {"vocab_size": found.rows, "tie_word_embeddings": tied}


def _says(metadata: Mapping[str, Any], found: Found, made: GgufConfig) -> bool:
    """Whether the file's architecture metadata and tensors are those of `made`."""
    theirs, ours = (
        {key: value for key, value in each.items() if key.startswith(found.values.prefix)}
        for each in (metadata, made.metadata)
    )
    if theirs.keys() != ours.keys() or not all(_same(theirs[key], ours[key]) for key in ours):
        return False
    if {name for name in ROPE_TENSORS if name in found.shapes} != made.tensors.keys():
        return False
    return all(
        tuple(found.shapes[name]) == tensor.shape and np.array_equal(found.read(name), tensor)
        for name, tensor in made.tensors.items()
    )


def _parsed(text: object) -> dict[str, Any] | None:
    try:
        found = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _same(one: object, other: object) -> bool:
    """Equal, floats as fp32; arrays of flags as lists."""
    if isinstance(one, np.ndarray):
        one = one.tolist()
    if isinstance(one, float) and isinstance(other, float):
        with np.errstate(all="ignore"):
            return bool(np.float32(one) == np.float32(other))
    return type(one) is type(other) and one == other
