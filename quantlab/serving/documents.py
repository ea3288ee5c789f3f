"""Passages for a question, put before it as `quantlab chat --index` does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantlab.generation.chat_sources import with_sources
from quantlab.generation.prompts import Message
from quantlab.generation.sources import GivenSource
from quantlab.serving.api_error import ApiError
from quantlab.serving.model_host import ModelHost

if TYPE_CHECKING:
    from quantlab.retrieval.index import Index

PASSAGE_SHARE = 2  # passages may take this part of what the context has for a conversation


@dataclass(frozen=True)
class Documents:
    """An index, and how it is searched where a request does not say."""

    index: Index
    passages: int
    method: str

    def put_before(
        self, message: Message, passages: int | None, method: str | None, room: int, host: ModelHost
    ) -> tuple[Message, list[dict[str, Any]]]:
        """The last message, a question, with passages before it, and these, by number from 1.

        Args:
            room: tokens of the whole conversation.

        Raises:
            ApiError: 400, the message is no question.
            InputError: the search fails, or the room holds no passage.
        """
        asked = message["content"]
        if message["role"] != "user" or not asked.strip():
            raise ApiError(400, "retrieval: the last message must be the user's question", field="messages")
        found = self.index.search(asked, passages or self.passages, method=method or self.method)
        given = [GivenSource(passage.cited, passage.text) for passage in found]
        question, kept = with_sources(asked, given, room // PASSAGE_SHARE, host.tokenizer)
        shown = [
            {"number": number, "source": source.source, "text": source.text, "score": passage.score}
            for number, (source, passage) in enumerate(zip(kept, found, strict=False), 1)
        ]
        return {"role": "user", "content": question}, shown


def open_documents(uri: str, passages: int, method: str, note: Callable[[str], None]) -> Documents:
    """The documents of an index; `note` takes a line about it.

    Raises:
        InputError: there is none, a number below 1, or an unknown method.
    """
    from quantlab.retrieval.index import check_search, open_index

    check_search(passages, method)
    return Documents(open_index(uri, say=note), passages, method)
