"""A question of a chat with the passages that were found for it: one message, as the rag template writes it."""

from __future__ import annotations

from collections.abc import Sequence

from quantlab.checkpoint import Tokenizer
from quantlab.generation.prompts import Prompt, messages
from quantlab.generation.sources import INSTRUCTION, GivenSource, Source, numbered_sources, within_budget


def with_sources(
    question: str, passages: Sequence[Source], budget: int, tokenizer: Tokenizer
) -> tuple[str, tuple[GivenSource, ...]]:
    """The message, and those passages that it holds, numbered from 1.

    It stays in the conversation as the model has read it, passages and all: so its cache stays good from turn to turn.

    Args:
        budget: the most tokens of all passages together.

    Raises:
        InputError: the budget holds not even the beginning of the first passage.
    """
    kept = within_budget(passages, budget, lambda text: len(tokenizer.encode(text, add_special_tokens=False)))
    (message,) = messages(Prompt(question, context=numbered_sources(kept)))
    return message["content"], kept


def shown_question(message: str) -> str:
    """What stands behind the passages of a message, its last paragraph; a message without any as it is."""
    return message.rpartition("\n\n")[2] if message.startswith(INSTRUCTION) else message
