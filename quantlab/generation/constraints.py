"""What may come next: the seam between the decoding loop and grammars, schemas or forced texts."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np

from quantlab.errors import InputError
from quantlab.generation.drafts import Offer


class Constraint(Protocol):
    """Follows one generated text, token by token; for one use."""

    @property
    def finished(self) -> bool:
        """Whether the text is complete and nothing can follow."""

    def allowed(self) -> np.ndarray | None:
        """Which tokens may come next, bool [vocabulary]; None: any. Not changed by the caller, valid until `take`."""

    def take(self, token: int) -> None:
        """The next token, which was allowed."""


@runtime_checkable
class Foreseeing(Protocol):
    """A constraint that knows at some places what has to come."""

    def forced(self) -> list[int]:
        """Tokens that will probably come next: the text is certain, how tokens divide it may not be."""


class ForcedTokens:
    """What a constraint forces, as drafts; see `Drafter`."""

    odds: tuple[float, ...] = (0.95,)

    def __init__(self, constraint: Foreseeing) -> None:
        self._constraint = constraint
        self._forced: list[int] = []

    def offer(self, text: list[int]) -> Offer | None:
        """See `Drafter`."""
        self._forced = self._constraint.forced()
        return Offer(0, len(self._forced)) if self._forced else None

    def draft(self, text: list[int], count: int) -> list[int]:
        """See `Drafter`."""
        return self._forced[:count]


class Masking:
    """Logits without the tokens that a constraint forbids, in memory that draws share."""

    def __init__(self, vocabulary: int) -> None:
        self._masked = np.empty(vocabulary, np.float32)

    def apply(self, logits: np.ndarray, allowed: np.ndarray | None) -> np.ndarray:
        """fp32 [vocabulary], minus infinity where `allowed` is False; valid until the next call.

        Raises:
            InputError: no token is allowed.
        """
        if allowed is None:
            return logits
        if not allowed.any():
            raise InputError("the constraint allows no token here; ask for another grammar or schema")
        self._masked.fill(-np.inf)
        np.copyto(self._masked, logits, where=allowed)
        return self._masked
