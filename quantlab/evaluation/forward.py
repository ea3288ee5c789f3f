"""Logits of a window from a transformers model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from quantlab.evaluation.windows import Window

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.inference_mode()
def window_logits(model: PreTrainedModel, window: Window) -> np.ndarray:
    """The logits that predict the window's targets, fp32 [targets, vocabulary]."""
    ids = torch.tensor([window.ids[:-1]], device=model.device)
    # use_cache=False: with a cache, transformers may build its mask as if documents were one sequence.
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=window.scored).logits[0]
    return logits.to(torch.float32).cpu().numpy()
