"""Continuations of texts by one model, each computed once however often it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from quantlab.generation.engine import Engine
from quantlab.generation.generator import Completion, complete
from quantlab.generation.prompt_format import PromptFormat
from quantlab.generation.samples import complete_many
from quantlab.generation.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0)


class Writer:
    """A loaded model and how it takes prompts; it remembers what it wrote until `forget`.

    Remembering changes no result: a continuation is a function of the text, its limits and its seed.
    """

    def __init__(self, engine: Engine, prompt_format: PromptFormat) -> None:
        self.engine, self.format = engine, prompt_format
        self._written: dict[tuple[object, ...], list[Completion]] = {}

    def tokens(self, text: str) -> int:
        """How many tokens a prompt is."""
        return len(self.format.ids(text))

    def write(
        self,
        text: str,
        max_tokens: int,
        *,
        params: SamplingParams = GREEDY,
        samples: int = 1,
        stop: Sequence[str] = (),
        on_text: Callable[[str], None] | None = None,
    ) -> list[Completion]:
        """Continue a text `samples` times; see `complete_many`. `on_text` hears of a single sample only.

        Raises:
            InputError: as `complete`.
        """
        key = (text, max_tokens, params, samples, tuple(stop))
        if key not in self._written:
            ids, tokenizer = self.format.ids(text), self.format.tokenizer
            if samples == 1:
                one = complete(
                    self.engine, tokenizer, ids, max_tokens=max_tokens, params=params, stop=stop, on_text=on_text
                )
                self._written[key] = [one]
            else:
                self._written[key] = complete_many(
                    self.engine, tokenizer, ids, samples, max_tokens=max_tokens, params=params, stop=stop
                )
        return self._written[key]

    def forget(self) -> None:
        """Give up what was written, of which a long run keeps every text."""
        self._written.clear()
