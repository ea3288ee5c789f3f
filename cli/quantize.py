"""`quantlab quantize MODEL OUT`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from quantlab.cli.console import check_threads, human_bytes, print_json, print_notes, print_table, progress
from quantlab.cli.options import Config, Json, Model, Threads


def quantize(
    model: Model,
    out: Annotated[Path, typer.Argument(help="Folder to make, or GGUF file if it ends in .gguf.", show_default=False)],
    format: Annotated[str, typer.Option("--format", "-f", help="q4_0, q4_1, q5_0, q5_1 or q8_0.")] = "q4_1",
    uniform: Annotated[bool, typer.Option("--uniform", help="Embedding and head take the format too.")] = False,
    method: Annotated[str, typer.Option("--method", help="rtn: round to nearest.")] = "rtn",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Report sizes and formats; write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT whatever it is.")] = False,
    threads: Threads = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Quantize a checkpoint to 4, 5 or 8 bits."""
    from quantlab.calibration.quantize import quantize_checkpoint

    check_threads(threads)
    with progress("quantizing", "weights") as report:
        result = quantize_checkpoint(
            model,
            out,
            format=format,
            uniform=uniform,
            method=method,
            overwrite=overwrite,
            dry_run=dry_run,
            threads=threads,
            progress=report,
        )
    if json:
        print_json(result)
        return
    rows = [
        (t.name, "x".join(map(str, t.shape)), t.format, f"{t.relative_error:.4f}" if t.relative_error else "",
         t.note or "")
        for t in result.tensors
    ]  # fmt: skip
    print_table(("tensor", "shape", "format", "relative error", ""), rows)
    print(
        f"\n{result.parameters / 1e6:.1f} M parameters: {human_bytes(result.source_bytes)} -> "
        f"{human_bytes(result.bytes)}, {result.bits_per_weight:.3f} bits per weight, {result.seconds:.1f} s"
    )
    print_notes(result.notes)
    print("dry run: nothing was written" if dry_run else f"written: {out}")
