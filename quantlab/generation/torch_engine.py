"""The torch engine: transformers' own forward with a KV cache, for one sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import DynamicCache

from quantlab.generation.engine import Engine

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TorchEngine(Engine):
    """See `Engine`; the oracle that the native engine is tested against, and what runs where that one cannot."""

    name = "torch"
    exact_batches = False

    def __init__(self, model: PreTrainedModel, context: int | None = None) -> None:
        super().__init__()
        self.model = model
        config = model.config.get_text_config()
        limit = int(config.max_position_embeddings)
        self.context = min(context or limit, limit)
        self.vocabulary = int(config.vocab_size)
        self._cache = DynamicCache(config=model.config)

    @torch.inference_mode()
    def _forward(self, token_ids: list[int], wanted: int) -> np.ndarray:
        ids = torch.tensor([token_ids], device=self.model.device)
        try:
            output = self.model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=wanted)
        except BaseException:  # some layers have taken the tokens, others have not
            self.tokens.clear()
            self._cache = DynamicCache(config=self.model.config)
            raise
        logits: np.ndarray = output.logits[0].to(torch.float32).cpu().numpy()
        return logits

    def _forget(self, position: int) -> None:
        if excess := self._cache.get_seq_length() - position:
            self._cache.crop(-excess)
