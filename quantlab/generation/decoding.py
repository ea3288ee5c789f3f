"""The one place where tokens are drawn: logits, what a constraint allows, the sampler, the token, the end."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np

from quantlab.generation.constraints import Constraint, Masking
from quantlab.generation.sampling import Sampler

if TYPE_CHECKING:
    from quantlab.generation.engine import Engine


class Decoding(Iterator[int]):
    """The tokens that follow an engine's sequence, drawn as they are asked for.

    It ends at `max_tokens`, behind the context's last place, or when the constraint has finished. A token becomes part
    of the engine's sequence when the next one is asked for; so the last one does not. Closed or left early, by an
    exception or Ctrl-C too, the sequence ends with the token before the last one that was given out.

    Attributes:
        logits: fp32 [vocabulary], the model's own, that the last token was drawn from.
    """

    def __init__(self, engine: Engine, sampler: Sampler, max_tokens: int, constraint: Constraint | None = None) -> None:
        self._engine, self._sampler, self._max_tokens = engine, sampler, max_tokens
        self._constraint, self._masking = constraint, Masking(engine.vocabulary)
        self._tokens = self._drawn()
        self.logits = np.empty(0, np.float32)

    def __next__(self) -> int:
        return next(self._tokens)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Draw no more."""
        self._tokens.close()

    def _drawn(self) -> Generator[int, None, None]:
        engine = self._engine
        prompt = engine.position  # what the sequence holds before the first draw was not generated
        for count in range(self._max_tokens):
            self.logits = engine.logits()
            token = self._draw(engine.tokens, prompt)
            yield token
            if engine.position >= engine.context or count + 1 == self._max_tokens or self._has_finished():
                return
            engine.append([token])

    def _draw(self, text: list[int], prompt: int) -> int:
        logits = self.logits
        if self._constraint is not None:
            logits = self._masking.apply(logits, self._constraint.allowed())
        token = self._sampler.draw(logits, text, len(text), prompt)
        if self._constraint is not None:
            self._constraint.take(token)
        return token

    def _has_finished(self) -> bool:
        return self._constraint is not None and self._constraint.finished
