"""A chat with one model: questions in, answers out as they are written, the engine's cache kept from turn to turn."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from quantlab.errors import InputError
from quantlab.generation.chat_layout import ChatLayout
from quantlab.generation.conversation import Conversation, Request
from quantlab.generation.drafters import DRAFT_TOKENS, check_speculation
from quantlab.generation.engine import Engine, OnChunk
from quantlab.generation.generator import Timings, complete
from quantlab.generation.prompts import Message
from quantlab.generation.sampling import Sampler, SamplingParams

SEEDS = 1 << 64
READING_CHUNK = 128  # tokens of a request that are computed before Ctrl-C is heeded: seconds, with a large model
OnText = Callable[[str], None]


@dataclass(frozen=True)
class Answer:
    """What the model said. `finish_reason` is "stopped" where an interrupt ended it; then there are no `timings`.

    `dropped` messages were left out for it, and will be from now on. A stopped answer without `text` is not kept, and
    its question neither.
    """

    text: str
    finish_reason: Literal["stop", "length", "stopped"]
    dropped: int
    seed: int
    timings: Timings | None


@dataclass(frozen=True)
class ChatStats:
    """Counts since the chat began. `cached_tokens` of `prompt_tokens` needed no computing; `context_used` tokens of
    `context` lie in the cache; `left_out` messages do not.
    """

    answers: int
    stopped: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    context: int
    context_used: int
    left_out: int
    seed: int


class Chat:
    """A conversation with an engine.

    Attributes:
        conversation: what has been said.
        params: how tokens are drawn; may be replaced between answers. InputError if the model cannot draw so.
        last: the last answer.

    Args:
        engine: of one sequence, which the chat has for itself.
        layout: how the model's conversations are written.
        system: the system prompt.
        max_tokens: of an answer. Room for so many, or for a quarter of the context if that is less, is kept free.
        stop: strings that end an answer, beside the layout's.
        on_overflow: what happens when the conversation outgrows the context; see `Conversation`.
        speculation, draft_model, draft_tokens: how tokens are drafted, which changes no answer; see `complete`.

    Raises:
        InputError: an argument is wrong.
    """

    def __init__(
        self,
        engine: Engine,
        layout: ChatLayout,
        *,
        system: str | None = None,
        params: SamplingParams | None = None,
        max_tokens: int = 1024,
        stop: Sequence[str] = (),
        on_overflow: str = "drop",
        speculation: str = "auto",
        draft_model: Engine | None = None,
        draft_tokens: int = DRAFT_TOKENS,
    ) -> None:
        check_speculation(speculation, draft_tokens, has_draft_model=draft_model is not None)
        self.engine = engine
        self.params = params or SamplingParams()
        self._speculation, self._draft_model, self._draft_tokens = speculation, draft_model, draft_tokens
        self._stop = (*layout.stop, *stop)
        self.conversation = Conversation(layout, engine.context, system=system, on_overflow=on_overflow)
        self.max_tokens = max_tokens
        self.last: Answer | None = None
        self._retries = 0
        self._answers = self._stopped = self._prompt_tokens = self._cached_tokens = self._generated_tokens = 0

    @property
    def params(self) -> SamplingParams:
        """How tokens are drawn."""
        return self._params

    @params.setter
    def params(self, params: SamplingParams) -> None:
        Sampler(params, self.engine.vocabulary)  # its checks
        self._params = params

    @property
    def max_tokens(self) -> int:
        """Of an answer."""
        return self._max_tokens

    @max_tokens.setter
    def max_tokens(self, count: int) -> None:
        if count < 1:
            raise InputError(f"max-tokens {count}: at least one token must be asked for")
        self._max_tokens = count
        self.conversation.limit = self.engine.context - min(count, self.engine.context // 4)

    def ask(self, question: str, on_text: OnText | None = None, on_reading: OnChunk | None = None) -> Answer:
        """Answer a question. KeyboardInterrupt ends the answer, and what is there of it stays.

        Args:
            on_text: called with each piece of text as soon as it is certain.
            on_reading: called with how many tokens of the request have been computed, and how many have to be, while
                that goes on.

        Raises:
            InputError: the conversation outgrows the context, or its layout or the tokenizer fails on it; the
                conversation is what it was.
        """
        answer = self._answer(self.conversation.question(question), 0, on_text, on_reading)
        self._retries = 0
        return answer

    def retry(self, on_text: OnText | None = None, on_reading: OnChunk | None = None) -> Answer:
        """Answer the last question again, with another seed: the parameters' plus the number of retries.

        Where the last message is a question without an answer, as in a loaded file, the seed is the parameters' own.

        Raises:
            InputError: there is no question; else as `ask`.
        """
        request = self.conversation.question_again()
        retries = self._retries + (len(request.messages) < len(self.conversation.messages))
        answer = self._answer(request, retries, on_text, on_reading)
        self._retries = retries
        return answer

    def undo(self) -> str:
        """Forget the last question and its answer.

        Returns:
            The question.

        Raises:
            InputError: there is none.
        """
        question = self.conversation.undo()[0]["content"]
        self._retries = 0
        return question

    def load(self, system: str | None, messages: Sequence[Message]) -> None:
        """Go on with another conversation."""
        self.conversation.replace(system, messages)
        self._retries = 0

    def stats(self) -> ChatStats:
        """What it took so far."""
        return ChatStats(
            answers=self._answers,
            stopped=self._stopped,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            generated_tokens=self._generated_tokens,
            context=self.engine.context,
            context_used=self.engine.position,
            left_out=self.conversation.left_out,
            seed=self.last.seed if self.last is not None else self.params.seed,
        )

    def _answer(self, request: Request, retries: int, on_text: OnText | None, on_reading: OnChunk | None) -> Answer:
        params = replace(self.params, seed=(self.params.seed + retries) % SEEDS)
        pieces: list[str] = []

        def note(piece: str) -> None:
            pieces.append(piece)
            if on_text is not None:
                on_text(piece)

        asked = len(request.token_ids)
        try:
            completion = complete(
                self.engine,
                self.conversation.layout.tokenizer,
                request.token_ids,
                max_tokens=self.max_tokens,
                params=params,
                stop=self._stop,
                on_text=note,
                speculation=self._speculation,
                draft_model=self._draft_model,
                draft_tokens=self._draft_tokens,
                reading_chunk=READING_CHUNK,
                on_reading=on_reading,
            )
        except KeyboardInterrupt:
            text = "".join(pieces)
            drawn = self.engine.tokens[asked:] if text else []  # else they may be those of an earlier answer
            answer = Answer(text, "stopped", request.dropped, params.seed, None)
        else:
            text, drawn = completion.text, list(completion.token_ids)
            answer = Answer(text, completion.finish_reason, request.dropped, params.seed, completion.timings)
        if text or answer.timings is not None:
            self.conversation.answered(request, text, drawn)
            with contextlib.suppress(KeyboardInterrupt):  # the answer is there; what is not kept is computed again
                self.engine.keep()
        self._count(answer, asked, len(drawn))
        return answer

    def _count(self, answer: Answer, asked: int, drawn: int) -> None:
        self.last = answer
        self._answers += 1
        self._stopped += answer.finish_reason == "stopped"
        self._prompt_tokens += asked
        self._cached_tokens += answer.timings.cached_tokens if answer.timings is not None else 0
        self._generated_tokens += drawn
