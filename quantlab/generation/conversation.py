"""A conversation, and the token ids that ask a model for its next answer within the context it has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quantlab.errors import InputError
from quantlab.generation.chat_layout import ChatLayout
from quantlab.generation.prompts import Message
from quantlab.generation.transcript import Transcript, common_length

OVERFLOW_POLICIES = ("drop", "refuse")


@dataclass(frozen=True)
class Request:
    """Messages of which the last waits for an answer, and the token ids that ask for it.

    `dropped` of them are left out that the request before it still held.
    """

    messages: list[Message]
    token_ids: list[int]
    dropped: int


class Conversation:
    """A system prompt and messages, as a model has seen them.

    Attributes:
        system: None for none.
        messages: of "user" and "assistant", without the system prompt.
        left_out: how many of the oldest messages requests leave out, because the context does not hold them.

    Args:
        layout: how it is written.
        limit: the most tokens of a request.
        on_overflow: "drop" leaves out the oldest messages, a question with its answers, until the rest takes half of
            the limit at most: what remains must be computed again, which should not happen at every turn. "refuse"
            raises an error.

    Raises:
        InputError: an unknown policy.
    """

    def __init__(self, layout: ChatLayout, limit: int, *, system: str | None = None, on_overflow: str = "drop") -> None:
        if on_overflow not in OVERFLOW_POLICIES:
            raise InputError(f"on-overflow {on_overflow!r}: choose one of: {', '.join(OVERFLOW_POLICIES)}")
        self.layout, self.limit, self.on_overflow = layout, limit, on_overflow
        self.system = system
        self.messages: list[Message] = []
        self.left_out = 0
        self._transcript = Transcript(layout.tokenizer)

    def question(self, text: str) -> Request:
        """Ask a new question.

        Raises:
            InputError: it is longer than the limit, the conversation is with it and the policy is to refuse, or the
                layout does not take these messages.
        """
        return self._request([*self.messages, {"role": "user", "content": text}])

    def question_again(self) -> Request:
        """Ask the last question once more, for another answer than the one it may have.

        Raises:
            InputError: there is none; else as `question`.
        """
        return self._request(self.messages[: self._last_question() + 1])

    def answered(self, request: Request, text: str, drawn: Sequence[int]) -> None:
        """Go on with the messages of a request, the last one made, and its answer.

        White space around the answer is kept where the layout writes it back as it was drawn, which keeps the cache of
        it good; else it is dropped.

        Args:
            text: the answer.
            drawn: its tokens, or a beginning of them; an end token or a stop string may be among them.
        """
        self._transcript.add_drawn(drawn)
        text = text.rstrip("\ufffd")  # half a character
        candidates = [[*request.messages, {"role": "assistant", "content": form}] for form in (text.strip(), text)]
        self.messages = max(candidates, key=self._agreement)  # of equals the first

    def undo(self) -> list[Message]:
        """Forget the last question and what answers it.

        Returns:
            What was forgotten.

        Raises:
            InputError: there is none.
        """
        start = self._last_question()
        forgotten, self.messages = self.messages[start:], self.messages[:start]
        self.left_out = self.left_out if self.left_out < start else 0  # with nothing behind it, all is tried again
        return forgotten

    def replace(self, system: str | None, messages: Sequence[Message]) -> None:
        """Begin again with other messages."""
        self.system, self.messages, self.left_out = system, list(messages), 0

    def _last_question(self) -> int:
        found = [n for n, message in enumerate(self.messages) if message["role"] == "user"]
        if not found:
            raise InputError("there is no message yet")
        return found[-1]

    def _request(self, messages: list[Message]) -> Request:
        start = self.left_out
        ids = self._transcript.ids(self._text(messages[start:]))
        if len(ids) > self.limit:
            start = self._shortened(messages, start, len(ids))
            ids = self._transcript.ids(self._text(messages[start:]))
        dropped, self.left_out = start - self.left_out, start
        return Request(messages, ids, dropped)

    def _shortened(self, messages: list[Message], start: int, size: int) -> int:
        """The first message to keep, where all from `start` on are `size` tokens."""
        starts = [n for n in range(start + 1, len(messages)) if messages[n]["role"] == "user"]
        if starts and self.on_overflow == "refuse":
            raise InputError(
                f"with this message the conversation has {size} tokens; {self.limit} fit beside an answer: "
                "/undo or /clear, or let the oldest messages be left out (--on-overflow drop)"
            )
        for start in starts:
            size = len(Transcript(self.layout.tokenizer).ids(self._text(messages[start:])))
            if size <= (self.limit if start == starts[-1] else self.limit // 2):
                return start
        what = "the message and the system prompt have" if self.system else "the message has"
        raise InputError(f"{what} {size} tokens; {self.limit} fit beside an answer: shorten it")

    def _agreement(self, messages: list[Message]) -> int:
        """How many characters of what is known the messages are written with."""
        try:
            written = self._text(messages[self.left_out :], generation_prompt=False)
        except InputError:  # a template that takes no conversation which ends with an answer
            return 0
        return common_length(written, self._transcript.text)

    def _text(self, messages: Sequence[Message], *, generation_prompt: bool = True) -> str:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return self.layout.text([*system, *messages], generation_prompt=generation_prompt)
