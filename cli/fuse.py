"""`quantlab fuse MODEL ADAPTER OUT`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from quantlab.cli.console import check_threads, human_bytes, print_json, print_notes, print_table, progress
from quantlab.cli.options import Config, Json, Model, Threads, weighted_adapters

if TYPE_CHECKING:
    from quantlab.calibration.fuse import FuseReport


@dataclass(frozen=True)
class Undone:
    """What `--undo` reports: the weights that have their old bytes again."""

    exact: bool
    tensors: tuple[str, ...]


def fuse(
    model: Model,
    adapter: Annotated[str, typer.Argument(help="Adapter's folder; DIR=0.5 gives a weight.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="Folder to make, or GGUF file if it ends in .gguf.", show_default=False)],
    adapters: Annotated[
        list[str] | None, typer.Option("--adapter", help="A further one; may be repeated.", show_default=False)
    ] = None,
    undo: Annotated[
        bool, typer.Option("--undo", help="MODEL has this block-sum adapter fused in: write it without, byte for byte.")
    ] = False,
    method: Annotated[
        str, typer.Option("--method", help="To quantize again what blocks cannot take up: rtn, search, gptq.")
    ] = "search",
    calibration: Annotated[
        Path | None, typer.Option("--calibration", help="Text for that, or .jsonl.", show_default="bundled text")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
    threads: Threads = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Fuse adapters into a model's weights, float or quantized."""
    check_threads(threads)
    if undo:
        _undo(model, adapter, adapters, out, overwrite, json)
        return
    from quantlab.calibration.calibrated import CalibrationOptions
    from quantlab.calibration.fuse import fuse_adapter
    from quantlab.calibration.samples import request_of

    options = None if calibration is None else CalibrationOptions(request=request_of(calibration, None, None, 0))
    with progress("fusing", "weights") as report:
        result = fuse_adapter(
            model,
            weighted_adapters([adapter, *(adapters or [])]),
            out,
            method=method,
            calibration=options,
            overwrite=overwrite,
            threads=threads,
            progress=report,
        )
    if json:
        print_json(result)
    else:
        _print_result(result, out)


def _undo(model: str, adapter: str, more: list[str] | None, out: Path, overwrite: bool, json: bool) -> None:
    from quantlab.calibration.fuse import undo_fuse
    from quantlab.errors import InputError

    if more:
        raise InputError("--undo: takes back one adapter; leave out --adapter")
    names = undo_fuse(model, adapter, out, overwrite=overwrite)
    if json:
        print_json(Undone(True, names))
    else:
        print(f"{len(names)} weights have their old bytes again\nwritten: {out}")


def _print_result(result: FuseReport, out: Path) -> None:
    rows = [
        (t.name, t.format, t.how, f"{t.relative_error:.2e}", f"{t.update_error:.2%}" if t.update_error else "0")
        for t in result.tensors
    ]
    print_table(("tensor", "format", "changed", "relative error", "of the update"), rows)
    print(f"\nexact: {'yes' if result.exact else 'no'}, {human_bytes(result.bytes)}, {result.seconds:.1f} s")
    print_notes(result.notes)
    if result.undo is not None:
        print(f"kept to undo: {result.undo}")
    print(f"written: {out}")
