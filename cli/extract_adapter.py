"""`quantlab extract-adapter BASE TUNED OUT`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from quantlab.cli.console import print_json, print_notes, print_table, progress, use_threads
from quantlab.cli.options import Config, Json, Threads


def extract_adapter(
    base: Annotated[
        str, typer.Argument(help="What the model was tuned from: folder, GGUF file or hub id.", show_default=False)
    ],
    tuned: Annotated[str, typer.Argument(help="The model that was fine-tuned.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="Folder to make: peft's two files.", show_default=False)],
    rank: Annotated[int, typer.Option("--rank", "-r", help="Directions to keep of each weight's change.")] = 16,
    targets: Annotated[
        str, typer.Option("--targets", help="attention, mlp, all-linear, or layers' names, with commas.")
    ] = "all-linear",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
    threads: Threads = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Write what a fine-tuned model changed as a LoRA adapter of its base."""
    use_threads(threads)
    from quantlab.adapters import extract

    with progress("extracting", "weights") as report:
        result = extract.extract_adapter(
            base, tuned, out, rank=rank, targets=targets, overwrite=overwrite, progress=report
        )
    if json:
        print_json(result)
        return
    rows = [(t.name, str(t.rank), f"{t.change:.2e}", f"{t.captured:.2%}") for t in result.tensors]
    print_table(("tensor", "rank", "change", "captured"), rows)
    print(
        f"\ncaptured: {result.captured:.2%} of the changes' squares, in {result.parameters / 1e3:.1f} k parameters, "
        f"{result.seconds:.1f} s"
    )
    print_notes(result.notes)
    print(f"written: {out}")
