"""Load models for torch: a quantized or float folder (or hub id) as a transformers model in evaluation mode."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from quantlab.checkpoint import open_checkpoint
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

    import torch
    from transformers import AutoModelForCausalLM

    import quantlab.hf  # noqa: F401 registers the quantizer

    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(
            str(checkpoint.path),
            dtype=dtype or torch.float32,
            trust_remote_code=False,
            weights_only=True,
            output_loading_info=True,
        )
    except (ValueError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{checkpoint.path}: transformers cannot load it: {reason[:400]}") from None
    if missing := sorted(info["missing_keys"]):
        raise InputError(f"{checkpoint.path}: {len(missing)} tensors are missing, {missing[0]} among them")
    if device is not None:
        loaded.to(device)
    return loaded.eval()
