"""`quantlab search INDEX QUERY`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer
from quantlab.cli.console import print_json, use_threads
from quantlab.cli.options import Config, Json, Threads

if TYPE_CHECKING:
    from quantlab.retrieval.passages import Passage


@dataclass(frozen=True)
class Searched:
    """What `--json` prints. `complete` is false where the last indexing run has not finished."""

    passages: list[Passage]
    method: str
    complete: bool
    seconds: float


def search(
    index: Annotated[str, typer.Argument(help="What `quantlab index` made.", show_default=False)],
    query: Annotated[str, typer.Argument(help="Question, or words to look for.", show_default=False)],
    k: Annotated[int, typer.Option("-k", help="Passages to show.")] = 4,
    method: Annotated[
        str, typer.Option("--method", help="vector (by meaning), keyword (by words), or hybrid (by both).")
    ] = "hybrid",
    embedding_model: Annotated[
        str | None,
        typer.Option("--embedding-model", help="The index's own, if it has moved.", show_default="where it was"),
    ] = None,
    threads: Threads = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Find the passages of an index that answer a question best."""
    use_threads(threads)
    import time

    from quantlab.retrieval.index import open_index

    opened = open_index(index, embedding_model=embedding_model, say=_say)
    started = time.perf_counter()
    passages = opened.search(query, k, method=method)
    if json:
        print_json(Searched(passages, method, opened.complete, time.perf_counter() - started))
    else:
        _print_passages(passages)


def _say(note: str) -> None:
    print(f"note: {note}", file=sys.stderr)


def _print_passages(passages: Sequence[Passage]) -> None:
    from quantlab.errors import one_line

    for number, passage in enumerate(passages, 1):
        ranks = (("vector", passage.vector_rank), ("keyword", passage.keyword_rank))
        where = ", ".join(f"{name} {rank}" for name, rank in ranks if rank is not None)
        print(f"{number}. {one_line(passage.cited)}  (score {passage.score:.4f}; rank by {where})")
        for line in passage.text.replace("\t", "    ").split("\n"):
            print(f"   {one_line(line, len(line) + 1)}".rstrip())  # a document may hold codes that a terminal obeys
        print()
    if not passages:
        print("no passage found", file=sys.stderr)
