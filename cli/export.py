"""`quantlab export MODEL OUT --to gguf|hf`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from quantlab.cli.console import human_bytes, print_json, print_notes, progress
from quantlab.cli.options import Config, Json, Model


def export(
    model: Model,
    out: Annotated[Path, typer.Argument(help="GGUF file (ending in .gguf) or folder to make.", show_default=False)],
    to: Annotated[str, typer.Option("--to", help="gguf or hf.", show_default=False)],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT whatever it is.")] = False,
    config: Config = None,
    json: Json = False,
) -> None:
    """Convert between Hugging Face folder and GGUF file; quantized weights stay as they are."""
    from quantlab.checkpoint.export import export_checkpoint

    with progress("exporting", "bytes") as report:
        result = export_checkpoint(model, out, to, overwrite=overwrite, progress=report)
    if json:
        print_json(result)
        return
    print_notes(result.notes)
    for name in result.changed:
        print(f"changed: {name} held numbers that the destination cannot")
    kept = "lossless" if result.lossless else f"{result.tensors_changed} changed"
    print(f"{result.tensors} tensors ({kept}), {human_bytes(result.bytes)}, {result.seconds:.1f} s")
    print(f"written: {out}")
