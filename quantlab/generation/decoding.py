"""The decoding loop: logits, the token that is drawn from them, the next logits, until the end."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np

from quantlab.generation.drawing import Drawing
from quantlab.generation.speculation import Speculation

if TYPE_CHECKING:
    from quantlab.generation.engine import Engine


class Decoding(Iterator[int]):
    """The tokens that follow an engine's sequence, drawn as they are asked for.

    It ends at `max_tokens`, behind the context's last place, or when the drawing has finished. A token becomes part
    of the engine's sequence when the next one is asked for; so the last one does not. Speculating, the engine may be
    ahead; but closed or left, by an exception or Ctrl-C too, the sequence ends before the last token given out.

    Attributes:
        logits: fp32 [vocabulary], the model's own, that the last token was drawn from.
    """

    def __init__(
        self,
        engine: Engine,
        drawing: Drawing,
        max_tokens: int,
        speculation: Speculation | None = None,
    ) -> None:
        self._engine, self._drawing, self._max_tokens = engine, drawing, max_tokens
        self._speculation = speculation if engine.exact_batches else None
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
        text = list(engine.tokens)
        prompt = known = len(text)  # what the sequence holds before the first draw was not generated
        end = min(prompt + self._max_tokens, engine.context + 1)
        draft: list[int] = []
        rows = [engine.logits()]  # behind the text, and behind each token of the draft
        accepted = 0
        try:
            while True:
                for row in rows:
                    known, self.logits = len(text), row
                    token = self._drawing.draw(row, text, prompt)
                    text.append(token)
                    is_drafted = accepted < len(draft) and token == draft[accepted]
                    accepted += is_drafted
                    yield token
                    if len(text) == end or self._drawing.finished:
                        return
                    if not is_drafted:
                        break
                if draft:
                    self._settle(accepted, known)
                draft, rows = self._passed(text, end - 1 - len(text))
                accepted = 0
        finally:
            self._settle(accepted, known)

    def _passed(self, text: list[int], room: int) -> tuple[list[int], list[np.ndarray]]:
        """A draft of at most `room` tokens, which may be none, and logits behind the text and each of its tokens."""
        engine, speculation = self._engine, self._speculation
        if speculation is None or len(text) < speculation.wake:
            engine.append(text[-1:])
            return [], [engine.logits()]
        draft = speculation.draft(text, room)
        if draft:
            rows = list(engine.append_all([text[-1], *draft]))
        else:
            engine.append(text[-1:])
            rows = [engine.logits()]
        speculation.passed()
        return draft, rows

    def _settle(self, accepted: int, known: int) -> None:
        """Take back what was appended behind the first `known` tokens; `logits` are those behind them."""
        if self._speculation is not None:
            self._speculation.settle(accepted, known)
        if self._engine.position > known:
            self._engine.rewind(known)
            self._engine.take((), self.logits)
