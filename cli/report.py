"""`quantlab report REFERENCE FILE... --text TEXT --out OUT`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from quantlab.cli.console import check_threads, human_bytes, print_json, print_table, progress
from quantlab.cli.options import Activations, Config, Context, Engine, Json, Threads, Windows


def report(
    reference: Annotated[str, typer.Argument(help="Reference model: folder, GGUF file or hub id.", show_default=False)],
    files: Annotated[list[str], typer.Argument(help="Models made from it.", metavar="FILE...", show_default=False)],
    text: Annotated[
        Path, typer.Option("--text", help="UTF-8 text file; lines <|endoftext|> part documents.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", help="OUT.html, or a folder of PNGs.", show_default=False)],
    context: Context = 512,
    windows: Windows = "documents",
    activations: Activations = "f32",
    engine: Engine = "auto",
    threads: Threads = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Compare several files with their reference and draw size against divergence."""
    check_threads(threads)
    from quantlab.evaluation.report import report_files

    with progress("comparing", "tokens") as advance:
        result = report_files(
            reference,
            files,
            text,
            out,
            context=context,
            windows=windows,
            engine=engine,
            activations=activations,
            threads=threads,
            progress=advance,
        )
    if json:
        print_json(result)
        return
    rows = [
        (file.file, human_bytes(file.bytes), f"{file.bits_per_weight:.3f}", f"{file.perplexity:.4f}",
         f"{file.kld_mean:.6f} +- {file.kld_stderr:.6f}", f"{100 * file.same_top:.2f} %")
        for file in result.files
    ]  # fmt: skip
    columns = ("file", "size", "bits per weight", "perplexity", "KL divergence", "same top token")
    print_table(columns, rows)
    print(f"reference {reference}: perplexity {result.perplexity:.4f}, {result.tokens} tokens")
    print(f"report: {result.report}")
