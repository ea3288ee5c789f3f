"""Load models for torch: a quantized or float folder (or hub id) as a transformers model in evaluation mode."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from quantlab.checkpoint import Checkpoint, open_checkpoint
from quantlab.errors import InputError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def load_model(
    model: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device | None = None
) -> PreTrainedModel:
    """Load a causal language model; packed weights stay packed and compute in float activations.

    Args:
        model: folder or hub id.
        dtype: of activations and unpacked weights; fp32 by default.
        device: where to put it; torch's default device if not given.

    Raises:
        InputError: the files are missing, damaged, of an unsupported family, or disagree with config.json.
    """
    checkpoint = open_checkpoint(model)  # its checks and one-line errors come first
    _check_tensors(checkpoint)

    import torch
    from transformers import AutoModelForCausalLM

    import quantlab.hf  # noqa: F401 registers the quantizer

    try:
        loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            str(checkpoint.path),
            dtype=dtype or torch.float32,
            trust_remote_code=False,
            weights_only=True,
        )
    except (ValueError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{checkpoint.path}: transformers cannot load it: {reason[:400]}") from None
    if device is not None:
        loaded.to(device)
    return loaded.eval()


def _check_tensors(checkpoint: Checkpoint) -> None:
    """Compare the files' headers with the model that config.json describes: every fault at once, before weights load.

    Raises:
        InputError: config.json describes no model, or tensors are missing or differ from it in shape or packing.
    """
    faults = []
    for name, shape in _model_shapes(checkpoint).items():
        if name not in checkpoint.names:
            faults.append(f"{name} is missing")
        elif checkpoint.shape(name) != shape:
            faults.append(f"{name} is {list(checkpoint.shape(name))} instead of {list(shape)}")
        elif checkpoint.recipe is not None and checkpoint.recipe.format_for(name, shape) != checkpoint.format(name):
            faults.append(f"{name} is not packed as the rules say")
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise InputError(f"{checkpoint.path}: the files are not those of its config.json: {faults[0]}{more}")


def _model_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that the model needs; [out, in] for linear weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(str(checkpoint.path), trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # whatever a value of config.json sets off
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{checkpoint.path / 'config.json'}: describes no model: {reason[:400]}") from None
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if checkpoint.tied:
        shapes.pop(checkpoint.family.head, None)
    return {name: shape[::-1] if checkpoint.family.is_transposed(name) else shape for name, shape in shapes.items()}
