"""Which engine runs a model: the native one, or torch for what that does not compute."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from quantlab.adapters.combine import Source as AdapterSource
from quantlab.checkpoint import open_checkpoint
from quantlab.checkpoint.expected_shapes import check_shapes
from quantlab.errors import InputError
from quantlab.generation.chosen_adapters import choose_adapters, fused_weights, stacked_factors
from quantlab.generation.decoder_description import describe
from quantlab.generation.engine import Engine
from quantlab.generation.native_engine import NativeEngine, load_native
from quantlab.generation.prompt_cache import PromptCache

ENGINES = ("auto", "native", "torch")
logger = logging.getLogger(__name__)


def load_engine(
    model: str | Path,
    *,
    threads: int | None = None,
    context: int | None = None,
    kv: str = "f16",
    activations: str = "int8",
    adapters: Sequence[AdapterSource] | None = None,
) -> NativeEngine:
    """Load a model into the native engine.

    Args:
        model: folder, GGUF file or hub id.
        threads: to compute with; by default one a core.
        context: the most tokens of a sequence; by default the model's own, but no more than 4096.
        kv: element type of the key-value cache: "f16", "f32" or "q8_0".
        activations: "int8", rounded before they meet packed weights, or "f32"; see `NativeEngine`.
        adapters: low-rank updates to compute beside the weights: `Adapter` or an adapter's folder, each alone or as
            (adapter, weight). `NativeEngine.set_adapters` exchanges them.

    Raises:
        InputError: see `open_checkpoint`, `NativeEngine` and `choose_adapters`.
    """
    return load_native(model, threads=threads, context=context, kv=kv, activations=activations, adapters=adapters)


def open_engine(
    model: str | Path,
    kind: str = "auto",
    *,
    threads: int | None = None,
    context: int | None = None,
    kv: str = "f16",
    activations: str = "int8",
    adapters: Sequence[AdapterSource] | None = None,
    prompt_cache: PromptCache | None = None,
) -> Engine:
    """The engine of that kind; "auto" takes the native one where it can, and else torch, with a warning.

    `kv`, `activations` and `prompt_cache` are the native one's; see `load_engine`, also for `adapters`. Torch computes
    in fp32.

    Raises:
        InputError: an unknown kind, or a model or adapter that cannot be read or that the kind asked for does not
            compute, or a prompt cache where torch computes.
    """
    if kind not in ENGINES:
        raise InputError(f"engine {kind!r}: choose one of: {', '.join(ENGINES)}")
    if kind == "torch":
        _refuse_cache(model, prompt_cache)
        return _torch_engine(model, threads, context, adapters)
    checkpoint = open_checkpoint(model)
    check_shapes(checkpoint)
    if kind == "auto":
        try:
            describe(checkpoint.config, str(checkpoint.path))
        except InputError as reason:
            logger.warning("torch engine, because the native one does not run this model: %s", reason)
            _refuse_cache(model, prompt_cache)
            return _torch_engine(model, threads, context, adapters)
    engine = NativeEngine(
        checkpoint, threads=threads, context=context, kv=kv, activations=activations, adapters=adapters
    )
    engine.prompt_cache = prompt_cache
    return engine


def _refuse_cache(model: str | Path, prompt_cache: PromptCache | None) -> None:
    if prompt_cache is not None:
        raise InputError(f"{model}: the torch engine keeps no caches; leave the prompt cache out")


def _torch_engine(
    model: str | Path, threads: int | None, context: int | None, adapters: Sequence[AdapterSource] | None
) -> Engine:
    checkpoint = open_checkpoint(model)
    chosen = choose_adapters(adapters or (), checkpoint)
    fused = fused_weights(chosen, checkpoint, threads)

    import torch

    from quantlab.generation.torch_adapters import add_adapters, replace_blocks
    from quantlab.generation.torch_engine import TorchEngine
    from quantlab.loading import load_model

    if threads is not None:
        torch.set_num_threads(threads)
    loaded = load_model(model)
    replace_blocks(loaded, fused)
    add_adapters(loaded, stacked_factors(chosen, fused))
    return TorchEngine(loaded, context)
