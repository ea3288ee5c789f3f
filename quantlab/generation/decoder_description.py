"""What the native decoder has to compute for a model, from its config.json: numbers, and rotary tables."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from quantlab.checkpoint.checked_values import CheckedValues
from quantlab.checkpoint.families import family_of
from quantlab.checkpoint.gguf_architectures import ROWS, ModelRow
from quantlab.checkpoint.gguf_config import metadata_of
from quantlab.checkpoint.gguf_details import GEMMA_PATTERN, PATTERN, WINDOW
from quantlab.checkpoint.gguf_sizes import Sizes, sizes_of_config
from quantlab.checkpoint.rope import YARN_BETAS, Rope, llama3_divisors, rope_of_config, ropes_by_layer_type
from quantlab.errors import InputError

NORMS = ("rms", "layer")  # in the order of the core's enumerations
EXACT_GELU = ("gelu", "gelu_python")  # by the error function, not by tanh
ACTIVATIONS = ("silu", "gelu_tanh", "gelu_erf")
LAYER_NORM_FAMILIES = ("gpt2", "gpt_neox")
GEMMAS = ("gemma2", "gemma3_text")


@dataclass(frozen=True)
class Description:
    """The fields of the core's DecoderSpec, and what its tables are made of.

    `windows` and `rope_tables` have an entry per layer: the sliding window (0: none) and which of `ropes` turns its
    queries and keys. `norm_offset` is to be added to norm weights.
    """

    sizes: Sizes
    norm: str
    activation: str
    gated: bool
    parallel_residual: bool
    embedding_scale: float
    attention_scale: float
    attention_cap: float
    logit_cap: float
    norm_offset: float
    windows: tuple[int, ...]
    rope_tables: tuple[int, ...]
    ropes: tuple[Rope, ...]


def describe(config: Mapping[str, Any], source: str) -> Description:
    """Describe a model.

    Raises:
        InputError: the configuration is wrong, or asks for something that the decoder does not compute.
    """
    row = ROWS[family_of(dict(config), source).model_type]
    values = row.config_values(config, source)
    sizes = sizes_of_config(row, values)
    # What GGUF files say of an architecture is checked and normalized: windows, caps, patterns.
    prefix = f"{row.architecture}."
    said = metadata_of(config, 1, source).metadata
    architecture = {key.removeprefix(prefix): value for key, value in said.items() if key.startswith(prefix)}
    windows = _windows(row, sizes, architecture)
    ropes = _ropes(row, values, sizes)
    if any(size % 16 for size in (sizes.width, sizes.head_dim, sizes.feed_forward)):
        raise InputError(f"{source}: hidden, head and inner sizes are no multiples of 16")
    is_gemma = row.model_type in GEMMAS
    query_scale = values.number("query_pre_attn_scalar") if is_gemma else float(sizes.head_dim)
    return Description(
        sizes=sizes,
        norm="layer" if row.model_type in LAYER_NORM_FAMILIES else "rms",
        activation=_activation(row, values),
        gated=row.model_type not in LAYER_NORM_FAMILIES,
        parallel_residual=bool(architecture.get("use_parallel_residual", False)),
        embedding_scale=float(np.float32(sizes.width**0.5)) if is_gemma else 1.0,
        attention_scale=query_scale**-0.5,
        attention_cap=float(architecture.get("attn_logit_softcapping", 0.0)),
        logit_cap=float(architecture.get("final_logit_softcapping", 0.0)),
        norm_offset=family_of(dict(config), source).gguf.norm_offset,
        windows=windows,
        rope_tables=tuple(int(len(ropes) > 1 and window > 0) for window in windows),
        ropes=ropes,
    )


def _activation(row: ModelRow, values: CheckedValues) -> str:
    name = values.text(row.activation)
    if name in EXACT_GELU:
        return "gelu_erf"
    return "gelu_tanh" if "gelu" in name else "silu"


def _windows(row: ModelRow, sizes: Sizes, architecture: Mapping[str, Any]) -> tuple[int, ...]:
    window = int(architecture.get(WINDOW, 0))
    pattern = architecture.get(PATTERN)
    if pattern is None and row.model_type in GEMMA_PATTERN:
        every = GEMMA_PATTERN[row.model_type]
        pattern = [(layer + 1) % every != 0 for layer in range(sizes.blocks)]
    pattern = [True] * sizes.blocks if pattern is None else pattern
    return tuple(window if slides else 0 for slides in pattern)


def _ropes(row: ModelRow, values: CheckedValues, sizes: Sizes) -> tuple[Rope, ...]:
    if row.rope is None:
        return ()
    if row.model_type == "gemma3_text":
        return ropes_by_layer_type(values, row.rope, sizes.head_dim, sizes.context)
    return (rope_of_config(values, row.rope, sizes.head_dim, sizes.context),)


def rotary_table(rope: Rope, context: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines, fp32 [context, rotated / 2] each, computed in fp32 as transformers does.

    Longrope's divisors are those for a text of `context` tokens.
    """
    frequencies = _frequencies(rope, context)
    angles = np.arange(context, dtype=np.float32)[:, None] * frequencies[None, :]
    factor = np.float32(rope.attention_factor)
    return np.cos(angles) * factor, np.sin(angles) * factor


def _frequencies(rope: Rope, context: int) -> np.ndarray:
    """fp32 [rotated / 2]."""
    exponents = np.arange(0, rope.dims, 2, dtype=np.float32) / np.float32(rope.dims)
    frequencies = (1 / np.power(rope.theta, exponents.astype(np.float64))).astype(np.float32)
    if rope.kind == "linear":
        return frequencies / np.float32(rope.factor)
    if rope.kind == "llama3":
        return frequencies / llama3_divisors(rope)
    if rope.kind == "longrope":
        return frequencies / np.array(rope.long if context > rope.original_context else rope.short, np.float32)
    if rope.kind == "yarn":
        kept = _yarn_share(rope)
        return (frequencies / np.float32(rope.factor)) * (1 - kept) + frequencies * kept
    return frequencies


def _yarn_share(rope: Rope) -> np.ndarray:
    """How much of each frequency stays as it is (Peng et al. 2023, arXiv 2309.00071, section 3.2), fp32 [dims / 2]."""

    def dimension(rotations: float) -> float:
        return rope.dims * math.log(rope.original_context / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = max(math.floor(dimension(YARN_BETAS["beta_fast"])), 0)
    high = min(math.ceil(dimension(YARN_BETAS["beta_slow"])), rope.dims - 1)
    ramp = (np.arange(rope.dims // 2, dtype=np.float32) - low) / max(high - low, 0.001)
    return 1 - np.clip(ramp, 0, 1).astype(np.float32)
