"""Layer paths: layers of several models in any order, the residual stream scaled between them, as a merge config.

Between layers that were not trained behind each other the stream is multiplied by a number (the W of arXiv 2403.13187,
section 3.2). An ordinary model has no place for it. But where every layer normalizes what it reads and adds what it
computes to the stream, the product c of all scales so far folds into the weights: with h = c * h', a layer that adds
f(norm(h)) to h adds f(norm(c * h')) / c to h', and norm(c * h') = sign(c) * norm(h'). So the matrices that write to the
stream are divided by c, biases included, and norms' gains take its sign. Only the norms' epsilon does not scale: it
counts c^-2 as much. The config that comes out is mergekit's passthrough: slices, and the parameter `scale` by filters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from quantlab.checkpoint.families import Family
from quantlab.errors import InputError

NOTED_SHIFT = 1e-5  # relative, of what a norm gives


@dataclass(frozen=True)
class Slot:
    """One step of a path: layer `layer` of `model` (as a merge config names it), and the number that the residual
    stream is multiplied by before it enters the layer.
    """

    model: str
    layer: int
    scale: float = 1.0


LayerPath = tuple[Slot, ...]


@dataclass(frozen=True)
class _Fold:
    """Parts of tensor names: of what writes to the residual stream, of the gains of norms that read it in layers, and
    of the gain behind all layers.
    """

    writers: tuple[str, ...]
    gains: tuple[str, ...]
    last_gain: str


_LLAMA = _Fold(
    ("self_attn.o_proj.", "mlp.down_proj."),
    ("input_layernorm.weight", "post_attention_layernorm.weight"),
    "model.norm.weight",
)
# Families whose layers have a norm in front of each part and none behind it. Where attention and MLP stand side by side
# (GPT-NeoX), either adds to the stream, and the same holds.
_FOLDS = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "phi3": _LLAMA,
    "gpt2": _Fold(("attn.c_proj.", "mlp.c_proj."), ("ln_1.weight", "ln_2.weight"), "transformer.ln_f.weight"),
    "gpt_neox": _Fold(
        ("attention.dense.", "mlp.dense_4h_to_h."),
        ("input_layernorm.weight", "post_attention_layernorm.weight"),
        "gpt_neox.final_layer_norm.weight",
    ),
}


def check_foldable(family: Family) -> None:
    """Refuse a family whose layers a scale does not fold into.

    Raises:
        InputError: it has norms behind attention and MLP.
    """
    if family.model_type not in _FOLDS:
        raise InputError(
            f"{family.model_type}: its layers have norms behind attention and MLP, which layer paths do not go "
            f"through; those of {', '.join(_FOLDS)} can be used"
        )


def cumulative(path: Sequence[Slot]) -> list[float]:
    """The product of the scales up to each slot, its own included."""
    products, product = [], 1.0
    for slot in path:
        product *= slot.scale
        products.append(product)
    return products


def path_config(path: Sequence[Slot], family: Family, **settings: Any) -> str:
    """A merge config (YAML) whose merge is the model of a path, with its scales folded in.

    Embeddings come from the first slot's model, the last norm and the head from the last slot's.

    Args:
        path: at least one slot.
        family: of the models.
        settings: further keys of the config, such as dtype; scaled weights are float32 unless it says otherwise.

    Raises:
        InputError: the family cannot be folded into, the path is empty, or the scales vanish or grow beyond all bounds.
    """
    import yaml

    check_foldable(family)
    products = cumulative(path)
    if not products:
        raise InputError("a layer path needs at least one layer")
    for place, product in enumerate(products):
        if not 1e-6 <= abs(product) <= 1e6:
            raise InputError(f"layer path: the scales up to place {place} multiply to {product:g}, which is no use")
    slices: list[dict[str, Any]] = []
    for model, first, last, product in _runs(path, products):
        source: dict[str, Any] = {"model": model, "layer_range": [first, last]}
        if product != 1:
            source["parameters"] = {"scale": _scales(_FOLDS[family.model_type], product)}
        slices.append({"sources": [source]})
    if products[-1] < 0:
        last_source = slices[-1]["sources"][0]
        last_source["parameters"]["scale"].insert(0, {"filter": _FOLDS[family.model_type].last_gain, "value": -1.0})
    dtype = {} if all(product == 1 for product in products) else {"dtype": "float32"}
    content = {"merge_method": "passthrough", **dtype, **settings, "slices": slices}
    return yaml.safe_dump(content, sort_keys=False)


def norm_shift(path: Sequence[Slot], epsilon: float, mean_square: float) -> float:
    """The largest relative difference that folding makes to what a norm gives, to first order.

    Args:
        epsilon: of the norms.
        mean_square: of the residual stream's elements where it is smallest; embeddings tell a bound.
    """
    shifts = [abs(1 / (product * product) - 1) for product in cumulative(path)]
    return max(shifts, default=0.0) * epsilon / (2 * mean_square) if mean_square > 0 else math.inf


def _runs(path: Sequence[Slot], products: Sequence[float]) -> Iterator[tuple[str, int, int, float]]:
    """(model, first layer, last layer not included, product) of slots that follow one another with nothing between."""
    start = 0
    for end in range(1, len(path) + 1):
        before = path[end - 1]
        joined = end < len(path) and (path[end].model, path[end].layer) == (before.model, before.layer + 1)
        if not joined or products[end] != products[end - 1]:
            yield path[start].model, path[start].layer, before.layer + 1, products[start]
            start = end


def _scales(fold: _Fold, product: float) -> list[dict[str, Any]]:
    """The parameter `scale` by filters."""
    scales: list[dict[str, Any]] = [{"filter": name, "value": 1 / product} for name in fold.writers]
    if product < 0:
        scales += [{"filter": name, "value": -1.0} for name in fold.gains]
    return [*scales, {"value": 1.0}]
