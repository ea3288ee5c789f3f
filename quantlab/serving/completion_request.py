"""What `/v1/completions` is asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field

from quantlab.generation.grammars import Grammar
from quantlab.serving.api_error import ApiError
from quantlab.serving.grammar_fields import chosen_grammar
from quantlab.serving.sampling_fields import SamplingFields

MOST_PROMPTS = 512
MOST_TEXTS = 1024  # samples of all prompts
MOST_LOGPROBS = 100
Prompt = str | list[int]


class CompletionRequest(SamplingFields):
    """OpenAI's, with llama.cpp's `grammar` and `json_schema`."""

    prompt: Any
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    best_of: int | None = None
    suffix: str | None = None

    def check(self) -> None:
        """Refuse what is not there.

        Raises:
            ApiError: 400.
        """
        if self.suffix:
            raise ApiError(400, "suffix: texts are not written into a gap here; leave it out", field="suffix")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ApiError(400, "best_of: all samples are returned; leave it out or let it be n", field="best_of")
        if self.echo and self.logprobs is not None and (self.stream or (self.n or 1) > 1):
            other = "stream" if self.stream else "n"
            raise ApiError(400, f"echo with logprobs is for one whole text; leave {other} out", field=other)

    def prompts(self) -> list[Prompt]:
        """Texts, or token ids that are taken as they are.

        Raises:
            ApiError: 400, something else, or too many.
        """
        given = self.prompt
        if isinstance(given, str) or _are_tokens(given):
            prompts = [given]
        elif isinstance(given, list) and given and all(isinstance(one, str) or _are_tokens(one) for one in given):
            prompts = given
        else:
            kinds = "a text, texts, token ids, or lists of token ids"
            raise ApiError(400, f"prompt: should be {kinds}, and no list may be empty", field="prompt")
        if len(prompts) > MOST_PROMPTS or len(prompts) * (self.n or 1) > MOST_TEXTS:
            raise ApiError(
                400, f"prompt: at most {MOST_PROMPTS} prompts and {MOST_TEXTS} texts are taken at once", field="prompt"
            )
        return prompts

    def constraint(self) -> Grammar | None:
        """What the texts have to be.

        Raises:
            ApiError: 400, more than one, or one that nothing can meet.
        """
        return chosen_grammar({"json_schema": self.json_schema}, self.grammar)


def _are_tokens(value: Any) -> bool:
    return isinstance(value, Sequence) and bool(value) and all(type(one) is int for one in value)
