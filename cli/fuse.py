"""`quantlab fuse MODEL ADAPTER OUT`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from quantlab.cli.console import check_threads, human_bytes, print_json, print_notes, print_table, progress
from quantlab.cli.options import Config, Json, Model, PromptLayout, Threads, weighted_adapters

if TYPE_CHECKING:
    from quantlab.adapters.fuse import FusedTensor
    from quantlab.calibration.fuse import FuseReport
    from quantlab.evaluation.recovery import Recovery
    from quantlab.training.prepared import DataSettings


@dataclass(frozen=True)
class Fused:
    """`FuseReport`, with what `--recovery` measured."""

    exact: bool
    tensors: tuple[FusedTensor, ...]
    bytes: int
    seconds: float
    notes: tuple[str, ...]
    undo: str | None
    recovery: Recovery | None


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
    recovery: Annotated[
        Path | None,
        typer.Option(
            "--recovery", help="Held-out rows or text: report which share of the gain is left.", show_default=False
        ),
    ] = None,
    context: Annotated[int, typer.Option("--context", help="Of --recovery: most tokens of a sample.")] = 512,
    prompt_field: Annotated[
        str | None, typer.Option("--prompt-field", help="... its rows' field for the prompt.")
    ] = None,
    completion_field: Annotated[
        str | None, typer.Option("--completion-field", help="... and for the completion.")
    ] = None,
    prompt_layout: PromptLayout = None,
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
    chosen = weighted_adapters([adapter, *(adapters or [])])
    rows = None
    if recovery is not None:
        from quantlab.training.data_files import find_data
        from quantlab.training.prepared import DataSettings

        find_data(recovery)  # a wrong name is told of before any work
        rows = DataSettings(
            context, prompt_field=prompt_field, completion_field=completion_field, prompt_layout=prompt_layout
        )
    with progress("fusing", "weights") as report:
        result = fuse_adapter(
            model,
            chosen,
            out,
            method=method,
            calibration=options,
            overwrite=overwrite,
            threads=threads,
            progress=report,
        )
    left = None if recovery is None else _measured(model, chosen, out, recovery, rows, threads)
    if json:
        print_json(Fused(**vars(result), recovery=left))
        return
    _print_result(result, out)
    if left is not None:
        print(
            f"recovery: {left.recovery:.4f} ({left.low:.4f} to {left.high:.4f}) of the gain: {left.loss_base:.4f} -> "
            f"{left.loss_adapter:.4f} with the adapter, {left.loss_fused:.4f} fused; nats per token, "
            f"{left.samples} samples"
        )


def _measured(
    model: str,
    adapters: Sequence[tuple[Path, float]],
    out: Path,
    data: Path,
    rows: DataSettings | None,
    threads: int | None,
) -> Recovery:
    from quantlab.evaluation.recovery import measure_recovery

    assert rows is not None
    with progress("scoring", "samples") as report:
        return measure_recovery(model, list(adapters), out, data, settings=rows, threads=threads, progress=report)


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
