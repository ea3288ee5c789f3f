"""`quantlab index DOCS OUT`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from quantlab.cli.console import print_json, progress, use_threads
from quantlab.cli.options import Config, Json, Threads

if TYPE_CHECKING:
    from quantlab.retrieval.document_files import Skipped
    from quantlab.retrieval.indexing import IndexReport

MOST_SKIPPED = 20  # lines about files that were left out


def index(
    docs: Annotated[Path, typer.Argument(help="Folder of documents, or one file.", show_default=False)],
    out: Annotated[str, typer.Argument(help="Index: a folder, or a URI that LanceDB takes.", show_default=False)],
    embedding_model: Annotated[
        str | None,
        typer.Option(
            "--embedding-model",
            help="Folder or hub id of a sentence-transformers model.",
            show_default="the index's own; of a new one sentence-transformers/all-MiniLM-L6-v2",
        ),
    ] = None,
    chunk_tokens: Annotated[
        int | None,
        typer.Option("--chunk-tokens", help="Of a passage, at most.", show_default="what the model reads, 254 at most"),
    ] = None,
    overlap: Annotated[
        int | None, typer.Option("--overlap", help="Tokens that the next passage repeats.", show_default="an eighth")
    ] = None,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Make it anew, with whatever settings.")] = False,
    threads: Threads = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Index documents for `search` and `generate --index`: text, Markdown, HTML, PDF and source code. Run it again when
    they have changed: only what is new is embedded.
    """
    use_threads(threads)
    import logging

    from quantlab.retrieval.indexing import index_documents

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # what it finds odd in a file that it can read
    with progress("indexing", "B") as report:
        result = index_documents(
            docs,
            out,
            embedding_model=embedding_model,
            chunk_tokens=chunk_tokens,
            overlap=overlap,
            rebuild=rebuild,
            progress=report,
        )
    for note in result.notes:
        print(f"note: {note}", file=sys.stderr)
    _print_skipped(result.skipped)
    if json:
        print_json(result)
    else:
        _print_result(result, out)


def _print_skipped(skipped: Sequence[Skipped]) -> None:
    for each in skipped[:MOST_SKIPPED]:
        print(f"skipped: {each.source}: {each.reason}", file=sys.stderr)
    if len(skipped) > MOST_SKIPPED:
        print(f"skipped: {len(skipped) - MOST_SKIPPED} more (--json lists them)", file=sys.stderr)


def _print_result(result: IndexReport, out: str) -> None:
    print(
        f"{result.documents} documents in {result.chunks} passages of up to {result.chunk_tokens} tokens, "
        f"{result.overlap} of them repeated; {result.embedding_model}, {result.dimension} dimensions"
    )
    print(
        f"{result.embedded} embedded, {result.unchanged} unchanged, {result.deleted} deleted, "
        f"{len(result.skipped)} skipped, {result.seconds:.1f} s"
    )
    if result.other_files:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in list(result.other_files.items())[:8])
        print(f"left out, being no documents: {kinds}" + (" ..." if len(result.other_files) > 8 else ""))
    print(f"written: {out}")
