"""The options by which commands search an index for passages."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from quantlab.retrieval.passages import Passage

PASSAGES = 4  # to find for a question
METHOD = "hybrid"

IndexPlace = Annotated[
    str | None,
    typer.Option("--index", metavar="DIR", help="Find passages in what `quantlab index` made.", show_default=False),
]
PassageCount = Annotated[int, typer.Option("--passage-count", "-k", help="Passages to find.")]
SearchMethod = Annotated[
    str, typer.Option("--search-method", help="vector (by meaning), keyword (by words), or hybrid (by both).")
]


def passage_search(index: str, k: int, method: str) -> Callable[[str], list[Passage]]:
    """A function from a question to its passages, best first; notes about the index go to stderr.

    Raises:
        InputError: there is no index, a k below 1, or an unknown method.
    """
    from quantlab.retrieval.index import check_search, open_index

    check_search(k, method)
    opened = open_index(index, say=_say)

    def search(question: str) -> list[Passage]:
        return opened.search(question, k, method=method)

    return search


def _say(note: str) -> None:
    print(f"note: {note}", file=sys.stderr)
