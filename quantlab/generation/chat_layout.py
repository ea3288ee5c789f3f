"""How a conversation is written for a model: by its own chat template, or in plain text where it has none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quantlab.checkpoint import Tokenizer
from quantlab.checkpoint.chat_text import check_template, render_chat
from quantlab.errors import InputError
from quantlab.generation.prompts import Message, without_system

PLAIN_STOPS = ("\nUser:", "\nAssistant:")
_SYSTEM, _QUESTION, _ANSWER, _NEXT = "Be as brief as a telegram.", "Where is Samarkand?", "In Asia.", "And Lima?"


@dataclass(frozen=True)
class ChatLayout:
    """What turns messages into the text that asks for the next answer, and what ends that answer.

    Attributes:
        template: a chat template; None: plain text, `User: ...` and `Assistant:` in lines.
        tokenizer: the model's; a token that ends a turn of the template ends a text too.
        stop: strings that end an answer where no token does.
        folds_system: the template has no place for a system prompt, so it leads the first message of the user.
    """

    template: str | None
    tokenizer: Tokenizer
    stop: tuple[str, ...]
    folds_system: bool

    def text(self, messages: Sequence[Message], *, generation_prompt: bool = True) -> str:
        """The conversation, special tokens written out; with `generation_prompt`, as a request for an answer.

        Raises:
            InputError: the template refuses these messages.
        """
        if self.template is None:
            return _plain_text(messages, generation_prompt)
        has_system = messages[:1] != [] and messages[0]["role"] == "system"
        chosen = without_system(list(messages)) if has_system and self.folds_system else messages
        return render_chat(
            self.template, chosen, self.tokenizer, "this conversation", generation_prompt=generation_prompt
        )


def chat_layout(template: str | None, tokenizer: Tokenizer) -> ChatLayout:
    """The layout of a template, tried on a small conversation; of plain text without one.

    Raises:
        InputError: the template cannot be compiled, or fails on a single message of a user.
    """
    if template is None:
        return ChatLayout(None, tokenizer, PLAIN_STOPS, folds_system=False)
    check_template(template)
    bare = ChatLayout(template, tokenizer, (), folds_system=False)
    bare.text([_user(_QUESTION)])
    end, stop = _turn_end(bare)
    ending = tokenizer if end is None else Tokenizer(tokenizer.backend, tokenizer.bos, tokenizer.eos | {end})
    return ChatLayout(template, ending, stop, folds_system=not _takes_system(bare))


def marks(tokenizer: Tokenizer) -> frozenset[int]:
    """Ids of the tokens that a text is split at before anything else, such as those between turns."""
    return frozenset(tokenizer.backend.get_added_tokens_decoder()) | tokenizer.eos


def _plain_text(messages: Sequence[Message], generation_prompt: bool) -> str:
    parts = [_plain_message(message["role"], message["content"]) for message in messages]
    return "\n".join([*parts, "Assistant:"] if generation_prompt else parts)


def _plain_message(role: str, content: str) -> str:
    if role == "system":
        return content + "\n"
    space = "" if content[:1].isspace() else " "  # an answer may begin with line breaks instead
    return f"{role.capitalize()}:{space}{content}"


def _takes_system(layout: ChatLayout) -> bool:
    """Whether a system prompt comes through; some templates refuse it, others leave it out without a word."""
    try:
        return _SYSTEM in layout.text([{"role": "system", "content": _SYSTEM}, _user(_QUESTION)])
    except InputError:
        return False


def _turn_end(layout: ChatLayout) -> tuple[int | None, tuple[str, ...]]:
    """What the template writes behind an answer: the token that it begins with, if it is a mark, or else its text.

    A model that was trained on the template stops there, whatever its configuration calls an end token.
    """
    answered = [_user(_QUESTION), {"role": "assistant", "content": _ANSWER}]
    try:
        text = layout.text([*answered, _user(_NEXT)], generation_prompt=False)
    except InputError:
        return None, ()
    _, _, behind = text.rpartition(_ANSWER)
    between, _, _ = behind.partition(_NEXT)
    tokenizer = layout.tokenizer
    ends = marks(tokenizer) - {tokenizer.bos}
    for token in tokenizer.encode(between, add_special_tokens=False):
        if token in ends:
            return token, ()
        if tokenizer.decode([token]).strip():
            break
    return None, (between.rstrip(),) if between.strip() else ()


def _user(content: str) -> Message:
    return {"role": "user", "content": content}
