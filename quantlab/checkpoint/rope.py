"""Rotary position embeddings: transformers' parameters, and what a GGUF file says of them, each from the other.

llama.cpp stretches a rotary embedding in four ways, and not every graph of it knows each (`RopeUse.kinds`). "linear"
and "yarn" are numbers in the metadata; of yarn's further parameters it reads `attn_factor` alone, which cos and sin are
multiplied by beyond yarn's own 1 + 0.1 ln(factor). "llama3" is a tensor of divisors, one per frequency; "longrope" two
of them, for short and for long contexts, with an `attn_factor`.

https://github.com/ggml-org/llama.cpp: src/llama-context.cpp (what it takes for missing keys), ggml/src/ggml-cpu/ops.cpp
(`rope_yarn`), conversion/llama.py and conversion/phi.py (the tensors).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from quantlab.checkpoint.checked_values import CheckedValues, is_positive, shortest
from quantlab.errors import InputError

FREQS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_TENSORS = (FREQS, LONG, SHORT)
KEEP_FOLDER = "llama.cpp does not compute this; keep the model as a Hugging Face folder"
DEFAULT_THETA = 10000.0
# llama.cpp's are fixed in all graphs that we write for; transformers' defaults are the same.
YARN_BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}
# Divisors do not tell what they were computed from. All public models take 1 and 4; the context is looked for here, and
# divisors that no try gives are kept as they are.
LLAMA3_LOW, LLAMA3_HIGH = 1.0, 4.0
LLAMA3_CONTEXTS = (8192, *(2**n for n in range(5, 21) if n != 13))
LLAMA3_TOLERANCE = 1e-5  # relative: llama.cpp's converter computes in fp32, where 1 - smooth costs some digits


@dataclass(frozen=True)
class RopeUse:
    """One model type's: what its graph in llama.cpp knows, and how older config.json files spell it.

    A `partial` type rotates a share of each head's columns. `synonyms` are kinds that transformers takes for others.
    """

    kinds: tuple[str, ...] = ("default", "linear", "yarn")
    partial: bool = False
    share: float = 1.0
    theta_key: str = "rope_theta"
    share_key: str = "partial_rotary_factor"
    synonyms: tuple[tuple[str, str], ...] = ()

    @property
    def longrope_by_tensors(self) -> bool:
        """Phi-3's files name no scaling type; the tensors tell."""
        return "longrope" in self.kinds and "llama3" not in self.kinds


@dataclass(frozen=True)
class Rope:
    """One rotary embedding: base, rotated columns per head, and how it is stretched.

    `original_context` is the length that the stretching starts from, `attention_factor` what cos and sin are multiplied
    by. `low` and `high` are llama3's, `betas` yarn's; `short` and `long` longrope's divisors, one per pair of columns.
    """

    theta: float
    dims: int
    kind: str = "default"
    factor: float = 1.0
    original_context: int = 0
    attention_factor: float = 1.0
    low: float = LLAMA3_LOW
    high: float = LLAMA3_HIGH
    betas: tuple[tuple[str, float], ...] = ()
    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()


def yarn_scale(factor: float, strength: float = 1.0) -> float:
    """Yarn's multiplier of cos and sin."""
    return 0.1 * strength * math.log(factor) + 1 if factor > 1 else 1.0


def longrope_scale(factor: float, original_context: int) -> float:
    """Longrope's multiplier of cos and sin."""
    return math.sqrt(1 + math.log(factor) / math.log(original_context)) if factor > 1 else 1.0


def llama3_divisors(rope: Rope) -> np.ndarray:
    """fp32 [dims / 2]: 1 for short waves, `factor` for long ones, and in between a harmonic mean."""
    waves = 2 * np.pi * rope.theta ** (np.arange(0, rope.dims, 2) / rope.dims)
    kept = np.clip((rope.original_context / waves - rope.low) / (rope.high - rope.low), 0, 1)
    return (1 / ((1 - kept) / rope.factor + kept)).astype(np.float32)


# ---- config.json -> Rope


def rope_of_config(config: CheckedValues, use: RopeUse, head_dim: int, context: int) -> Rope:
    """What config.json says in `rope_parameters`, or in `rope_scaling` and keys of their own, as older files do.

    Raises:
        InputError: a value is missing or wrong, or llama.cpp's graph of this model does not compute it.
    """
    old, new = config.mapping("rope_scaling"), config.mapping("rope_parameters")
    label, given = ("rope_scaling", old) if old else ("rope_parameters", new)
    if "full_attention" in given or "sliding_attention" in given:
        raise config.fault(label, "differs by layer type", KEEP_FOLDER)
    more = {"rope_theta": config.get(use.theta_key, DEFAULT_THETA), "rope_type": given.get("type", "default")}
    original = config.get("original_max_position_embeddings", None)
    if original is not None:  # transformers prefers what stands outside
        given["original_max_position_embeddings"] = original
    share = config.get(use.share_key, use.share)
    values = config.below(label, {"partial_rotary_factor": share} | more | given)
    return _read(values, use, head_dim, context)


def ropes_by_layer_type(config: CheckedValues, use: RopeUse, head_dim: int, context: int) -> tuple[Rope, Rope]:
    """Gemma 3's two: of the layers with full attention and of those with a sliding window, which are never stretched.

    Raises:
        InputError: as for `rope_of_config`.
    """
    old, new = config.mapping("rope_scaling"), config.mapping("rope_parameters")
    nested = config.below("rope_parameters", new)
    full = (nested.mapping("full_attention") or {"rope_type": "default"}) | old
    sliding = nested.mapping("sliding_attention")
    found = []
    for name, given, theta, kinds in (
        ("full_attention", full, config.get("rope_theta", 1e6), use.kinds),
        ("sliding_attention", sliding, config.get("rope_local_base_freq", DEFAULT_THETA), ("default",)),
    ):
        share = config.get(use.share_key, use.share)
        more = {"rope_theta": theta, "rope_type": given.get("type", "default"), "partial_rotary_factor": share}
        found.append(_read(nested.below(name, more | given), replace(use, kinds=kinds), head_dim, context))
    if found[0].kind == "yarn" and found[0].attention_factor != yarn_scale(found[0].factor):
        raise nested.fault("full_attention", "has an attention factor of its own", KEEP_FOLDER)  # llama.cpp: all layers
    return found[0], found[1]


def _read(values: CheckedValues, use: RopeUse, head_dim: int, context: int) -> Rope:
    kind = values.text("rope_type")
    kind = dict(use.synonyms).get(kind, kind)
    if kind not in use.kinds:
        raise values.refusal("rope_type", f"one of {', '.join(use.kinds)}", KEEP_FOLDER)
    share = values.number("partial_rotary_factor")
    dims = int(head_dim * min(share, 2.0))
    if (share != 1 and not use.partial) or not 2 <= dims <= head_dim or dims % 2:
        raise values.refusal(
            "partial_rotary_factor", f"a share of {head_dim} columns that llama.cpp rotates", KEEP_FOLDER
        )
    rope = Rope(values.number("rope_theta"), dims, kind)
    return rope if kind == "default" else _READERS[kind](values, rope, context)


def _read_linear(values: CheckedValues, rope: Rope, context: int) -> Rope:
    return replace(rope, factor=values.number("factor"))


def _read_yarn(values: CheckedValues, rope: Rope, context: int) -> Rope:
    original = values.integer("original_max_position_embeddings", context)
    factor = context / original if values.get("factor") is None else values.number("factor")
    for key, fixed in YARN_BETAS.items():
        if (values.get(key, None) or fixed) != fixed:
            raise values.refusal(key, f"{fixed:g}", KEEP_FOLDER)
    if not values.flag("truncate", True):
        raise values.refusal("truncate", "true", KEEP_FOLDER)
    attention = yarn_scale(factor)
    if values.get("attention_factor", None) is not None:
        attention = values.number("attention_factor")
    elif values.get("mscale", None) and values.get("mscale_all_dim", None):
        attention = yarn_scale(factor, values.number("mscale")) / yarn_scale(factor, values.number("mscale_all_dim"))
    return replace(rope, factor=factor, original_context=original, attention_factor=attention)


def _read_llama3(values: CheckedValues, rope: Rope, context: int) -> Rope:
    low, high = values.number("low_freq_factor"), values.number("high_freq_factor")
    if low >= high:
        raise values.refusal("low_freq_factor", f"less than high_freq_factor, {high:g}")
    original = values.integer("original_max_position_embeddings", context)
    return replace(rope, factor=values.number("factor"), low=low, high=high, original_context=original)


def _read_longrope(values: CheckedValues, rope: Rope, context: int) -> Rope:
    original = values.integer("original_max_position_embeddings", context, least=2)
    factor = context / original if values.get("factor", None) is None else values.number("factor")
    attention = longrope_scale(factor, original)
    if values.get("attention_factor", None) is not None:
        attention = values.number("attention_factor")
    short, long = (_divisors(values, key, rope.dims // 2) for key in ("short_factor", "long_factor"))
    return replace(rope, original_context=original, attention_factor=attention, short=short, long=long)


def _divisors(values: CheckedValues, key: str, count: int) -> tuple[float, ...]:
    found = values.get(key)
    if not isinstance(found, list) or len(found) != count or not all(map(is_positive, found)):
        raise values.fault(key, f"is no list of {count} positive numbers")
    return tuple(map(float, found))


_READERS: dict[str, Callable[[CheckedValues, Rope, int], Rope]] = {
    "linear": _read_linear,
    "yarn": _read_yarn,
    "llama3": _read_llama3,
    "longrope": _read_longrope,
}


# ---- Rope -> GGUF


def gguf_of_rope(rope: Rope, use: RopeUse) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Metadata (keys without the architecture) and fp32 tensors."""
    metadata: dict[str, Any] = {"rope.freq_base": rope.theta}
    if rope.kind in ("linear", "yarn"):
        metadata |= {"rope.scaling.type": rope.kind, "rope.scaling.factor": rope.factor}
    if rope.kind == "yarn":
        metadata["rope.scaling.original_context_length"] = rope.original_context
        beyond = rope.attention_factor / yarn_scale(rope.factor)
        if np.float32(beyond) != 1:
            metadata["rope.scaling.attn_factor"] = beyond
    if rope.kind == "llama3":
        return metadata, {FREQS: llama3_divisors(rope)}
    if rope.kind != "longrope":
        return metadata, {}
    if not use.longrope_by_tensors:
        if rope.short == rope.long and rope.attention_factor == 1:
            return metadata, {FREQS: np.array(rope.long, np.float32)}
        metadata["rope.scaling.type"] = "longrope"
    metadata["rope.scaling.original_context_length"] = rope.original_context
    metadata["rope.scaling.attn_factor"] = rope.attention_factor
    return metadata, {LONG: np.array(rope.long, np.float32), SHORT: np.array(rope.short, np.float32)}


# ---- GGUF -> Rope


def rope_of_gguf(
    values: CheckedValues,
    use: RopeUse,
    head_dim: int,
    context: int,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
) -> Rope:
    """What metadata (below the architecture's name) and the tensors beside it say.

    Raises:
        InputError: a value is wrong, or the embedding is one that transformers' model of this type does not compute.
    """
    dims = values.integer("rope.dimension_count", head_dim, least=2)
    if dims % 2 or dims > head_dim or (dims != head_dim and not use.partial):
        raise values.refusal("rope.dimension_count", f"a part of a head's {head_dim} columns that can be rotated")
    rope = Rope(values.number("rope.freq_base", DEFAULT_THETA), dims)
    divisors = {name: _read_divisors(values, name, dims // 2, shapes, read) for name in ROPE_TENSORS if name in shapes}
    kind, factor = _stretching(values)
    original = values.integer("rope.scaling.original_context_length", context, least=0) or context
    attention = values.number("rope.scaling.attn_factor", 1.0)
    if kind == "longrope" or (use.longrope_by_tensors and divisors):
        if set(divisors) != {LONG, SHORT} or factor != 1:
            raise values.fault("rope.scaling.type", f"does not go with {LONG} and {SHORT} as the file has them")
        found = _longrope(rope, divisors, original, attention, context)
    elif divisors:
        if set(divisors) != {FREQS} or factor != 1 or kind == "yarn" or attention != 1:
            raise values.fault("rope.scaling.type", f"does not go with {', '.join(divisors)}")
        found = _llama3(rope, divisors[FREQS], context)
    elif kind == "yarn":
        found = _yarn(values, replace(rope, factor=factor, original_context=original), attention)
    elif attention != 1:
        raise values.refusal("rope.scaling.attn_factor", f"1 for a rotary embedding that is {kind}")
    else:
        found = replace(rope, kind="default" if factor == 1 else "linear", factor=factor)
    if found.kind not in use.kinds:
        raise values.fault("rope.scaling.type", f"asks for {found.kind}; this architecture has {', '.join(use.kinds)}")
    return found


def _stretching(values: CheckedValues) -> tuple[str, float]:
    """Scaling type and factor, with what llama.cpp takes for missing ones."""
    kind = values.text("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise values.refusal("rope.scaling.type", "none, linear, yarn or longrope")
    key = "rope.scaling.factor" if values.has("rope.scaling.factor") else "rope.scale_linear"
    factor = values.get(key, 0)
    is_absent = isinstance(factor, int | float) and factor == 0
    return kind, 1.0 if kind == "none" or is_absent else shortest(values.number(key))


def _read_divisors(
    values: CheckedValues,
    name: str,
    count: int,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
) -> np.ndarray:
    fault = InputError(f"{values.source}: tensor {name} is not {count} positive numbers; {values.way_out}")
    if tuple(shapes[name]) != (count,):
        raise fault
    found = np.asarray(read(name), np.float32)
    if not all(map(is_positive, found.tolist())):
        raise fault
    return found


def _decimals(divisors: np.ndarray) -> tuple[float, ...]:
    return tuple(map(shortest, divisors.tolist()))


def _longrope(rope: Rope, divisors: Mapping[str, np.ndarray], original: int, attention: float, context: int) -> Rope:
    short, long = _decimals(divisors[SHORT]), _decimals(divisors[LONG])
    usual = longrope_scale(context / original, original) if original > 1 else 1.0
    attention = usual if np.float32(usual) == np.float32(attention) else shortest(attention)
    return replace(rope, kind="longrope", original_context=original, attention_factor=attention, short=short, long=long)


def _llama3(rope: Rope, divisors: np.ndarray, context: int) -> Rope:
    """The parameters behind the divisors; where they are not the usual ones, longrope with the divisors themselves."""
    rope = replace(rope, kind="llama3", factor=shortest(float(divisors.max())))
    for original in LLAMA3_CONTEXTS:
        found = replace(rope, original_context=original)
        if np.allclose(llama3_divisors(found), divisors, rtol=LLAMA3_TOLERANCE, atol=0):
            return found
    kept = _decimals(divisors)
    return replace(rope, kind="longrope", factor=1.0, original_context=context, short=kept, long=kept)


def _yarn(values: CheckedValues, rope: Rope, beyond: float) -> Rope:
    """`attn_factor` is what llama.cpp reads; the other keys its converter copies from config.json."""
    attention = yarn_scale(rope.factor)
    if values.has("rope.scaling.attn_factor"):
        attention *= beyond
        attention = _simplest(
            attention, lambda value: np.float32(value / yarn_scale(rope.factor)) == np.float32(beyond)
        )
    elif values.has("rope.scaling.yarn_attn_factor"):
        attention = shortest(values.number("rope.scaling.yarn_attn_factor"))
    betas = {key: values.number(f"rope.scaling.yarn_{key}", usual) for key, usual in YARN_BETAS.items()}
    others = tuple((key, shortest(value)) for key, value in betas.items() if value != YARN_BETAS[key])
    return replace(rope, kind="yarn", attention_factor=attention, betas=others)


# ---- Rope -> config.json


def parameters_of_rope(rope: Rope, use: RopeUse, head_dim: int, context: int) -> dict[str, Any]:
    """transformers' `rope_parameters`, in the new spelling."""
    found: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": shortest(rope.theta)}
    if use.partial:
        found["partial_rotary_factor"] = _share(rope.dims, head_dim)
    if rope.kind in ("linear", "yarn", "llama3"):
        found["factor"] = rope.factor
    if rope.kind in ("yarn", "llama3", "longrope"):
        found["original_max_position_embeddings"] = rope.original_context
    if rope.kind == "yarn":
        if rope.attention_factor != yarn_scale(rope.factor):
            found["attention_factor"] = rope.attention_factor
        found |= rope.betas
    if rope.kind == "llama3":
        found |= {"low_freq_factor": rope.low, "high_freq_factor": rope.high}
    if rope.kind == "longrope":
        found |= {
            "factor": context / rope.original_context,
            "attention_factor": rope.attention_factor,
            "short_factor": list(rope.short),
            "long_factor": list(rope.long),
        }
    return found


def _share(dims: int, head_dim: int) -> float:
    """The share of a head's columns that makes `dims` of them, as transformers computes it."""
    share = dims / head_dim
    return share if int(head_dim * share) == dims else math.nextafter(share, 2)


def _simplest(value: float, serves: Callable[[float], object]) -> float:
    """What serves as well with fewer digits."""
    rounded = (float(f"{value:.{digits}g}") for digits in range(1, 10))
    return next((number for number in rounded if serves(number)), value)
