"""`quantlab export MODEL OUT --to gguf|hf`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from quantlab.cli.console import human_bytes, print_json, print_notes, progress
from quantlab.cli.options import Config, Json, Model

if TYPE_CHECKING:
    from quantlab.checkpoint.checkpoint import Checkpoint


def export(
    model: Model,
    out: Annotated[Path, typer.Argument(help="GGUF file (ending in .gguf) or folder to make.", show_default=False)],
    to: Annotated[str, typer.Option("--to", help="gguf or hf.", show_default=False)],
    base: Annotated[
        str | None,
        typer.Option("--base", help="MODEL is an adapter: the model it is for.", show_default="as its files say"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT whatever it is.")] = False,
    config: Config = None,
    json: Json = False,
) -> None:
    """Convert between Hugging Face folder and GGUF file; quantized weights stay as they are. Adapters go to GGUF."""
    from quantlab.adapters.reading import is_adapter

    if is_adapter(model):
        _export_adapter(model, base, out, to, overwrite, json)
        return
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


def _export_adapter(adapter: str, base: str | None, out: Path, to: str, overwrite: bool, json: bool) -> None:
    from quantlab.adapters.gguf_adapter import export_adapter
    from quantlab.adapters.reading import read_adapter
    from quantlab.errors import InputError

    if to != "gguf" or out.suffix != ".gguf":
        raise InputError(f"{adapter}: is an adapter in Hugging Face form already; give --to gguf and a name in .gguf")
    result = export_adapter(read_adapter(adapter), _base(adapter, base), out, overwrite=overwrite)
    if json:
        print_json(result)
        return
    scales = "" if result.lossless else f", scales folded into {result.tensors_changed} of them"
    print(f"adapter of {result.tensors} tensors{scales}, {human_bytes(result.bytes)}\nwritten: {out}")


def _base(adapter: str, given: str | None) -> Checkpoint:
    from quantlab.adapters.peft_folder import base_of
    from quantlab.checkpoint import open_checkpoint
    from quantlab.errors import InputError

    if given is not None:
        return open_checkpoint(given)
    named = base_of(Path(adapter))
    try:
        return open_checkpoint(named)
    except InputError as error:
        raise InputError(f"{adapter}: the base that its files name cannot be opened ({error}); give --base") from None
