"""Logits of whole windows from a transformers model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from quantlab.evaluation.windows import Window

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.inference_mode()
def window_logits(model: PreTrainedModel, windows: list[Window]) -> np.ndarray:
    """fp32 [windows, tokens, vocabulary] for windows of equal length."""
    ids = torch.tensor([window.ids for window in windows], device=model.device)
    # use_cache=False: with a cache, transformers may build its mask as if windows were one sequence.
    logits = model(input_ids=ids, use_cache=False).logits
    return logits.to(torch.float32).cpu().numpy()
