"""How one model takes prompts: by its own chat template, or as plain text where it has none."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from quantlab.checkpoint import Tokenizer
from quantlab.checkpoint.chat_text import chat_ids, chat_template, render_chat
from quantlab.errors import InputError
from quantlab.generation.prompts import Message, Prompt, messages, plain_text, without_system


@dataclass(frozen=True)
class PromptFormat:
    """`template` is the chat template (None: plain text), `where` names the model in messages about it."""

    tokenizer: Tokenizer
    template: str | None
    where: str

    def text(self, prompt: Prompt) -> str:
        """The text that the model continues, up to `begun`.

        Raises:
            InputError: the chat template refuses the messages.
        """
        return plain_text(prompt) if self.template is None else self._rendered(messages(prompt)) + prompt.begun

    def ids(self, text: str) -> list[int]:
        """Token ids of `text` and what has been written behind it, one start token before them if the model has one.

        Raises:
            InputError: as `Tokenizer.encode`.
        """
        return self.tokenizer.encode(text) if self.template is None else chat_ids(text, self.tokenizer)

    def _rendered(self, conversation: list[Message]) -> str:
        assert self.template is not None
        try:
            return render_chat(self.template, conversation, self.tokenizer, self.where, generation_prompt=True)
        except InputError:
            if conversation[0]["role"] != "system":
                raise
        # Gemma's and others refuse the role; what cannot be said either way is reported here.
        return render_chat(
            self.template, without_system(conversation), self.tokenizer, self.where, generation_prompt=True
        )


def prompt_format(model: str | Path, tokenizer: Tokenizer, *, ignore_chat_template: bool = False) -> PromptFormat:
    """The format of a model folder, GGUF file or hub id.

    Raises:
        InputError: a file that may hold a chat template is broken.
    """
    template = None if ignore_chat_template else chat_template(model)
    return PromptFormat(tokenizer, template, str(model))
