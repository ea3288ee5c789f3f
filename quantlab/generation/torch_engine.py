"""The torch engine: transformers' own forward with a KV cache, for one sequence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import DynamicCache

from quantlab.errors import InputError
from quantlab.generation.sampling import SamplingParams, sample

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFILL_CHUNK = 512  # tokens per forward pass: bounds the memory of a long prompt


class TorchEngine:
    """A sequence of tokens, its KV cache, and the logits that follow it."""

    name = "torch"

    def __init__(self, model: PreTrainedModel, context: int | None = None) -> None:
        self.model = model
        limit = int(model.config.get_text_config().max_position_embeddings)
        self.context = min(context or limit, limit)
        self.tokens: list[int] = []
        self._cache = DynamicCache(config=model.config)
        self._logits: np.ndarray | None = None

    @property
    def position(self) -> int:
        """Number of tokens so far."""
        return len(self.tokens)

    def prefill(self, token_ids: Sequence[int], chunk: int | None = None) -> int:
        """Make the sequence `token_ids`, keeping the cache of the longest common prefix.

        Returns:
            How many tokens came from the cache.

        Raises:
            InputError: no tokens, an id outside the vocabulary, more than the context holds, or a chunk of none.
        """
        self._check(token_ids)
        if chunk is not None and chunk < 1:
            raise InputError(f"chunk {chunk}: at least 1 token is needed")
        common = 0
        for old, new in zip(self.tokens, token_ids, strict=False):
            if old != new:
                break
            common += 1
        common = min(common, len(token_ids) - 1)  # the last token runs again: its logits are wanted
        self.rewind(common)
        step = chunk or PREFILL_CHUNK
        for start in range(common, len(token_ids), step):
            self._forward(list(token_ids[start : start + step]))
        return common

    def logits(self) -> np.ndarray:
        """fp32 [vocabulary] for the next token."""
        assert self._logits is not None, "prefill first"
        return self._logits

    def decode(self, params: SamplingParams, max_tokens: int) -> Iterator[int]:
        """Draw tokens until `max_tokens` or the context's end; one is computed with when the next is asked for."""
        for count in range(max_tokens):
            token = sample(self.logits(), self.tokens, params, self.position)
            yield token
            if self.position >= self.context or count + 1 == max_tokens:
                return
            self._forward([token])

    def rewind(self, position: int) -> None:
        """Forget all tokens from `position` on; those before it stay cached.

        Raises:
            InputError: the sequence has no such position.
        """
        if not 0 <= position <= self.position:
            raise InputError(f"position {position}: the sequence has {self.position} tokens")
        if position < self.position:
            self._cache.crop(position - self.position)  # negative: that many tokens less
            self._logits = None
            del self.tokens[position:]

    def _check(self, token_ids: Sequence[int]) -> None:
        if not token_ids:
            raise InputError("the prompt holds no token")
        vocabulary = int(self.model.config.get_text_config().vocab_size)
        if outside := [i for i in token_ids if not 0 <= i < vocabulary]:
            raise InputError(f"token id {outside[0]} is outside the vocabulary of {vocabulary}")
        if len(token_ids) > self.context:
            raise InputError(f"the prompt has {len(token_ids)} tokens; the context holds {self.context}")

    @torch.inference_mode()
    def _forward(self, token_ids: list[int]) -> None:
        ids = torch.tensor([token_ids], device=self.model.device)
        output = self.model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._logits = output.logits[0, -1].to(torch.float32).cpu().numpy()
        self.tokens.extend(token_ids)
