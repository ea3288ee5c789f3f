"""peft's two files, adapter_config.json and adapter_model.safetensors, read and written without peft.

Names in the file: `base_model.model.<module>.lora_A.weight` [rank, in], `.lora_B.weight` [out, rank], and DoRA's
`.lora_magnitude_vector` [out]. peft 0.21 keeps `alpha_pattern` and `rank_pattern` by regular expression over module
names. What quantlab adds, the method and what fusing must know, lies in the safetensors header under `quantlab`, which
other readers skip.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from quantlab.adapters.adapter import METHODS, Adapter, LowRankPair, Training, is_block_constant
from quantlab.checkpoint.atomic import atomic_folder
from quantlab.checkpoint.json_file import parse_json, read_json
from quantlab.checkpoint.safetensors_file import SafetensorsFile
from quantlab.checkpoint.tensors import FLOAT_DTYPES, first_nonfinite, to_fp32
from quantlab.errors import InputError
from quantlab.formats.blocks import BLOCK_SIZE

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
HEADER_KEY = "quantlab"
PREFIX = "base_model.model."
LARGEST_SCALE = float(np.finfo(np.float32).max)
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<part>A|B|magnitude_vector)(\.weight)?")


def read_peft_folder(folder: Path) -> Adapter:
    """The adapter in a peft folder.

    Raises:
        InputError: files that are missing or damaged, another method than LoRA, or parts beside the low-rank factors
            (embeddings, whole modules, biases) that quantlab cannot apply.
    """
    config = _checked_config(folder)
    if not (folder / WEIGHTS).is_file():
        found = f"only {PICKLED}, a pickle, which is not read; save it again as safetensors" if (
            folder / PICKLED
        ).exists() else f"no {WEIGHTS}"  # fmt: skip
        raise InputError(f"{folder}: holds {found}")
    file = SafetensorsFile(folder / WEIGHTS)
    try:
        parts = _read_parts(file)
        note = _note(file)
    finally:
        file.close()
    pairs = {f"{module}.weight": _pair(folder, module, found, config) for module, found in parts.items()}
    method = note.pop("method", "lora")
    adapter = Adapter(folder, method, pairs, Training(**note))
    if method == "block-sum":
        _check_block_constant(adapter)
    return adapter


def base_of(folder: Path) -> str:
    """The model that an adapter's files name as theirs.

    Raises:
        InputError: they name none.
    """
    base = read_json(folder / CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise InputError(f"{folder / CONFIG}: names no base model; give it with --base")
    return base


def _checked_config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).is_file():
        raise InputError(f"{folder}: holds no {CONFIG}; give a folder that peft or quantlab finetune wrote")
    config, place = read_json(folder / CONFIG), folder / CONFIG
    if config.get("peft_type") != "LORA":
        raise InputError(f"{place}: peft_type is {config.get('peft_type')!r}; only LORA adapters are supported")
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        raise InputError(f"{place}: the adapter trains biases, which is not supported; train it with bias none")
    for key in ("modules_to_save", "trainable_token_indices", "target_parameters"):
        if config.get(key):
            raise InputError(f"{place}: {key} is set; only low-rank updates of linear layers are supported")
    for key in ("r", "lora_alpha"):
        value = config.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
            raise InputError(f"{place}: {key} is {value!r}; a positive number is expected")
    for key in ("alpha_pattern", "rank_pattern"):
        if not isinstance(config.get(key) or {}, dict):
            raise InputError(f"{place}: {key} is no object of patterns and numbers")
    return config


def _read_parts(file: SafetensorsFile) -> dict[str, dict[str, np.ndarray]]:
    """By module: the factors A, B and, with DoRA, magnitude_vector, as fp32."""
    parts: dict[str, dict[str, np.ndarray]] = {}
    for name, entry in file.entries.items():
        match = _FACTOR.fullmatch(name.removeprefix(PREFIX))
        if match is None:
            raise InputError(f"{file.path}: tensor {name} is no factor of a linear layer's update; not supported")
        if entry.dtype not in FLOAT_DTYPES or len(entry.shape) != (1 if match["part"] == "magnitude_vector" else 2):
            raise InputError(f"{file.path}: tensor {name} is {entry.dtype} {list(entry.shape)}; not a LoRA factor")
        raw = file.read(name)
        if first_nonfinite(raw, entry.dtype) is not None:
            raise InputError(f"{file.path}: tensor {name} holds NaN or infinity; the training failed or it is damaged")
        parts.setdefault(match["module"], {})[match["part"]] = to_fp32(raw, entry.dtype).reshape(entry.shape)
    if not parts:
        raise InputError(f"{file.path}: holds no tensor")
    return parts


def _pair(folder: Path, module: str, parts: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> LowRankPair:
    if missing := [part for part in ("A", "B") if part not in parts]:
        raise InputError(f"{folder / WEIGHTS}: {module}: lora_{missing[0]} is missing")
    a, b, magnitude = parts["A"], parts["B"], parts.get("magnitude_vector")
    if a.shape[0] != b.shape[1] or not a.size or not b.size:
        raise InputError(f"{folder / WEIGHTS}: {module}: lora_A {list(a.shape)} and lora_B {list(b.shape)} do not fit")
    if (magnitude is not None) != bool(config.get("use_dora")) or (
        magnitude is not None and magnitude.shape != b.shape[:1]
    ):
        raise InputError(f"{folder / WEIGHTS}: {module}: its magnitude vector and use_dora in {CONFIG} disagree")
    alpha = _by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    scale = alpha / math.sqrt(len(a)) if config.get("use_rslora") else alpha / len(a)
    if not abs(scale) <= LARGEST_SCALE:
        raise InputError(f"{folder / CONFIG}: {module}: a scale of {scale:g} is beyond single precision; damaged")
    return LowRankPair(a, b, scale, magnitude)


def _by_pattern(patterns: Mapping[str, float] | None, module: str, default: float) -> float:
    """peft's rule: the first key that matches the name's end, as a regular expression."""
    for key, value in (patterns or {}).items():
        try:
            matches = re.match(rf"(.*\.)?({key})$", module) is not None
        except re.error:
            raise InputError(f"alpha_pattern {key!r} is no regular expression") from None
        if matches and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise InputError(f"alpha_pattern {key!r}: {value!r} is no number")
        if matches:
            return float(value)
    return float(default)


def _note(file: SafetensorsFile) -> dict[str, Any]:
    """What quantlab recorded; nothing for other programs' adapters."""
    if HEADER_KEY not in file.metadata:
        return {}
    known = {"method", *(item.name for item in fields(Training))}
    try:
        note = parse_json(file.metadata[HEADER_KEY].encode())
    except (ValueError, RecursionError):
        note = None
    if not isinstance(note, dict) or not _is_sound(note):
        raise InputError(f"{file.path}: its quantlab note is damaged, or a newer version's; upgrade quantlab")
    return {key: value for key, value in note.items() if key in known}


def _is_sound(note: Mapping[str, Any]) -> bool:
    kinds = {"base": str, "regrid": bool, "device": str, "levels": int | None, "vocabulary": int}
    return note.get("method") in METHODS and all(isinstance(note[key], kinds[key]) for key in kinds if key in note)


def _check_block_constant(adapter: Adapter) -> None:
    for name, pair in adapter.pairs.items():
        if not is_block_constant(pair.a, BLOCK_SIZE):
            raise InputError(f"{adapter.path}: {name}: marked block-sum, and its lora_A varies within a block; damaged")


def write_peft_folder(adapter: Adapter, config: Mapping[str, Any], folder: Path, *, replace: bool = False) -> None:
    """Write peft's two files; the folder appears complete or not at all.

    Args:
        config: of adapter_config.json; its `lora_alpha` and ranks must give the pairs' scales.
        replace: whether an existing folder may be replaced.

    Raises:
        InputError: the folder exists, or cannot be written.
    """
    with atomic_folder(folder, replace) as temporary:
        write_adapter_files(adapter, config, temporary)


def write_adapter_files(adapter: Adapter, config: Mapping[str, Any], folder: Path) -> None:
    """Write peft's two files into a folder that is there."""
    from safetensors.numpy import save

    tensors = {}
    for name, pair in adapter.pairs.items():
        module = PREFIX + name.removesuffix(".weight")
        tensors[f"{module}.lora_A.weight"] = np.ascontiguousarray(pair.a)
        tensors[f"{module}.lora_B.weight"] = np.ascontiguousarray(pair.b)
        if pair.magnitude is not None:
            tensors[f"{module}.lora_magnitude_vector"] = np.ascontiguousarray(pair.magnitude)
    note = json.dumps({"method": adapter.method, **asdict(adapter.training)})
    content = save(tensors, metadata={"format": "pt", HEADER_KEY: note})
    (folder / WEIGHTS).write_bytes(_ordered(content))
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _ordered(content: bytes) -> bytes:
    """A safetensors file with the keys of its metadata in order, which the library draws at random: equal adapters are
    to be equal files.
    """
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
    assert len(ordered) == length, "the order of keys changes no length"
    return content[:8] + ordered + content[8 + length :]
