"""The one place where tokens are drawn: logits, what a constraint allows of them, the sampler, the token."""

from __future__ import annotations

import numpy as np

from quantlab.generation.constraints import Constraint, Masking
from quantlab.generation.sampling import Sampler, SamplingParams


class Drawing:
    """Draws the tokens of one text; a constraint follows what is drawn.

    Raises:
        InputError: see `Sampler`.
    """

    def __init__(self, params: SamplingParams, vocabulary: int, constraint: Constraint | None = None) -> None:
        self._sampler, self._constraint = Sampler(params, vocabulary), constraint
        self._masking = Masking(vocabulary)

    def draw(self, logits: np.ndarray, text: list[int], prompt: int) -> int:
        """The token behind `text`, of which the first `prompt` tokens were not generated.

        Args:
            logits: fp32 [vocabulary] behind the text.

        Raises:
            InputError: the constraint allows no token, or as `Sampler.draw`.
        """
        if self._constraint is not None:
            logits = self._masking.apply(logits, self._constraint.allowed())
        token = self._sampler.draw(logits, text, len(text), prompt)
        if self._constraint is not None:
            self._constraint.take(token)
        return token

    @property
    def finished(self) -> bool:
        """Whether the constraint is complete, so that nothing can follow."""
        return self._constraint is not None and self._constraint.finished
