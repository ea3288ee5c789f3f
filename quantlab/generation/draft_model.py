"""Drafts by a smaller model of the same vocabulary, which draws as the larger one does.

Both draw with the same seed at the same position, so they agree more often than their distributions alone would have it
(Leviathan et al. 2023, arXiv 2211.17192, draw independently and correct the difference).
"""

from __future__ import annotations

import logging
from dataclasses import replace

from quantlab.errors import InputError
from quantlab.generation.drafts import Offer
from quantlab.generation.engine import Engine
from quantlab.generation.sampling import Sampler, SamplingParams

logger = logging.getLogger(__name__)
MOST = 64  # tokens of a draft


class DraftModel:
    """See `Drafter`. The engine follows one text; what its sequence shares with that already is not computed again.

    Args:
        engine: of the smaller model.
        params: of the text's own sampler.
        vocabulary: of the larger model.
        prompt: tokens of the text that were not drawn.
    """

    odds: tuple[float, ...] = (0.7,)

    def __init__(self, engine: Engine, params: SamplingParams, vocabulary: int, prompt: int) -> None:
        self._engine, self._prompt = engine, prompt
        self._shared = min(vocabulary, engine.vocabulary)  # what lies beyond is padding in one of them
        bias = {token: value for token, value in params.logit_bias.items() if token < self._shared}
        self._sampler = Sampler(replace(params, logit_bias=bias), self._shared)
        self._agreed = 0  # tokens that text and engine are known to share
        self._is_lost = False

    def offer(self, text: list[int]) -> Offer | None:
        """See `Drafter`; none where the text is longer than the engine's context."""
        room = self._engine.context - len(text)
        return Offer(0, min(room, MOST)) if room > 0 and not self._is_lost else None

    def draft(self, text: list[int], count: int) -> list[int]:
        """See `Drafter`; none, and no offer any more, if the smaller model knows a token not or computes no number."""
        history = list(text)
        try:
            self._follow(text)
            for place in range(count):
                logits = self._engine.logits()[: self._shared]
                history.append(self._sampler.draw(logits, history, len(history), self._prompt))
                if place + 1 < count:
                    self._engine.append(history[-1:])
        except InputError as fault:
            logger.warning("the draft model is of no use for this text: %s", fault)
            self._is_lost = True
        return history[len(text) :]

    def _follow(self, text: list[int]) -> None:
        """Make the engine's sequence the text."""
        engine = self._engine
        if self._agreed:
            most, common = min(engine.position, len(text) - 1), min(self._agreed, engine.position, len(text) - 1)
            while common < most and engine.tokens[common] == text[common]:
                common += 1
            engine.rewind(common)
            engine.append(text[common:])
        else:
            engine.prefill(text)
        self._agreed = len(text)
