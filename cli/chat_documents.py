"""The documents that a chat answers from: an index, and the sources of the last answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quantlab.generation.chat import Chat
    from quantlab.retrieval.passages import Passage

PASSAGE_SHARE = 2  # passages may take this part of what the context has for a conversation


@dataclass(frozen=True)
class ChatDocuments:
    """An index by its name, and how it is searched."""

    index: str
    search: Callable[[str], Sequence[Passage]]

    def put_before(self, question: str, chat: Chat) -> tuple[str, tuple[str, ...]]:
        """The question with passages before it, and where these come from, by number from 1.

        Raises:
            InputError: the search fails, or the context holds no passage.
        """
        from quantlab.generation.chat_sources import with_sources
        from quantlab.generation.sources import GivenSource

        passages = [GivenSource(passage.cited, passage.text) for passage in self.search(question)]
        conversation = chat.conversation
        budget = conversation.limit // PASSAGE_SHARE
        message, kept = with_sources(question, passages, budget, conversation.layout.tokenizer)
        return message, tuple(passage.source for passage in kept)
