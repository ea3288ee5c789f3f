"""A model made ready for training: with a LoRA by peft on the chosen layers, or with all its weights."""

from __future__ import annotations

import functools
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from quantlab.adapters.adapter import Adapter, LowRankPair, Training
from quantlab.adapters.fusing import Fusion
from quantlab.adapters.targets import shortest_names, target_modules
from quantlab.checkpoint.checkpoint import Checkpoint
from quantlab.errors import InputError
from quantlab.formats.blocks import BLOCK_SIZE
from quantlab.training.finetune_settings import FinetuneSettings

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

ADAPTER = "default"  # peft's name of the one that is trained


def fusion_of(settings: FinetuneSettings) -> Fusion | None:
    """How the adapter enters blocks in training; None for a plain LoRA."""
    if not settings.fuses:
        return None
    method = "merge-aware" if settings.merge_aware else settings.method
    return Fusion(method, regrid=settings.regrid, levels=settings.levels)


def check_base(checkpoint: Checkpoint, settings: FinetuneSettings) -> list[str]:
    """The modules to adapt, none for full training.

    Raises:
        InputError: the base cannot be trained so.
    """
    packed = {name for name in checkpoint.names if checkpoint.format(name) is not None}
    if settings.method == "full":
        if packed:
            raise InputError(
                f"{checkpoint.path}: is quantized, and --method full trains float weights; "
                "give the float model, or train a LoRA on this one"
            )
        return []
    modules = target_modules(checkpoint, settings.targets)
    fusion = fusion_of(settings)
    packed_targets = [name for name in modules if f"{name}.weight" in packed]
    if settings.dora and packed_targets:
        raise InputError(
            f"{checkpoint.path}: --dora needs the norms of float rows, and {packed_targets[0]} is packed; "
            "leave it out, or give the float model"
        )
    if fusion is None:
        return modules
    option = "--merge-aware" if settings.merge_aware else "--method block-sum"
    for name in modules:
        format = checkpoint.format(f"{name}.weight")
        if format is None:
            raise InputError(
                f"{checkpoint.path}: {option} trains through the blocks of a quantized base, and {name} is not packed; "
                "quantize the model first, or train a plain LoRA"
            )
        fusion.check_format(format, f"{checkpoint.path}: {name}")
        format.with_levels(fusion.levels)
    return modules


def with_adapter(
    model: PreTrainedModel, checkpoint: Checkpoint, modules: list[str], settings: FinetuneSettings
) -> PeftModel:
    """`model` with a fresh adapter, A Gaussian (standard deviation 1 / rank) and B zero: it computes what it did."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=shortest_names(checkpoint.names, modules),
        use_rslora=settings.rslora,
        use_dora=settings.dora,
        init_lora_weights="gaussian",
        fan_in_fan_out=any(checkpoint.family.is_transposed(f"{name}.weight") for name in modules),
        bias="none",
        task_type="CAUSAL_LM",
    )
    fusion = fusion_of(settings)
    if fusion is not None:
        from quantlab.adapters.fused_layers import FusedLoraLinear
        from quantlab.nn import QuantLinear

        # peft's door for layers of one's own; it is not saved with the configuration, and need not be.
        config._register_custom_module({QuantLinear: functools.partial(FusedLoraLinear, fusion=fusion)})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")  # peft turns it as the layer needs
        adapted = get_peft_model(model, config, adapter_name=ADAPTER)
    adapted.peft_config[ADAPTER].base_model_name_or_path = ""  # else peft asks the hub for it at every checkpoint
    return adapted


def trained_adapter(
    model: PeftModel, checkpoint: Checkpoint, settings: FinetuneSettings, training: Training
) -> Adapter:
    """The adapter as data, float32 on the CPU."""
    from peft.tuners.lora.layer import LoraLayer

    fusion = fusion_of(settings)
    pairs = {}
    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer) or ADAPTER not in layer.lora_A:
            continue
        a, b = _array(layer.lora_A[ADAPTER].weight), _array(layer.lora_B[ADAPTER].weight)
        if settings.method == "block-sum":
            a = np.repeat(a, BLOCK_SIZE, axis=1)
        magnitude = _array(layer.lora_magnitude_vector[ADAPTER].weight) if settings.dora else None
        pairs[f"{name}.weight"] = LowRankPair(a, b, float(layer.scaling[ADAPTER]), magnitude)
    return Adapter(checkpoint.path, "lora" if fusion is None else fusion.method, pairs, training)


def _array(tensor: Any) -> np.ndarray:
    return np.ascontiguousarray(tensor.detach().float().cpu().numpy())


def peft_config_fields(model: PeftModel, base: str) -> dict[str, Any]:
    """What adapter_config.json says, for inference."""
    config: LoraConfig = model.peft_config[ADAPTER]
    fields = {**config.to_dict(), "base_model_name_or_path": base, "inference_mode": True}
    return {key: _plain(value) for key, value in fields.items()}


def _plain(value: Any) -> Any:  # Any: what peft's configuration holds
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return value.value if hasattr(value, "value") else value
