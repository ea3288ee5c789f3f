"""`quantlab quantize MODEL OUT`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from quantlab.cli.console import check_threads, human_bytes, print_json, print_notes, print_table, progress
from quantlab.cli.options import Config, Json, Model, Threads
from quantlab.cli.target import check_targets, print_outcome, quantize_by_target

if TYPE_CHECKING:
    from quantlab.calibration.quantize import QuantizeReport

File = Path | None


def quantize(
    context: typer.Context,
    model: Model,
    out: Annotated[Path, typer.Argument(help="Folder to make, or GGUF file if it ends in .gguf.", show_default=False)],
    format: Annotated[str, typer.Option("--format", "-f", help="q4_0, q4_1, q5_0, q5_1, q8_0 or ternary.")] = "q4_1",
    uniform: Annotated[bool, typer.Option("--uniform", help="Embedding and head take the format too.")] = False,
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="Instead of --format: a preset (q4_1-mixed ...) or YAML file.")
    ] = None,
    method: Annotated[
        str,
        typer.Option("--method", help="rtn: round to nearest; search: scales weighed by inputs; gptq; learned."),
    ] = "rtn",
    levels: Annotated[
        int | None, typer.Option("--levels", help="Use only so many codes in the blocks' layers (a stress test).")
    ] = None,
    calibration: Annotated[
        File, typer.Option("--calibration", help="Text, or .jsonl of text or messages.", show_default="bundled text")
    ] = None,
    calibration_samples: Annotated[
        int | None, typer.Option("--calibration-samples", help="Windows to read.", show_default="128")
    ] = None,
    calibration_length: Annotated[
        int | None, typer.Option("--calibration-length", help="Tokens in each.", show_default="512, if the model can")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Draws the windows.")] = 0,
    calibration_dtype: Annotated[
        str, typer.Option("--calibration-dtype", help="float32, or bfloat16 where the processor is fast with it.")
    ] = "float32",
    calibration_activations: Annotated[
        str, typer.Option("--calibration-activations", help="int8, as the engine multiplies, or float (slower).")
    ] = "int8",
    statistics: Annotated[
        File, typer.Option("--statistics", help="Of an earlier run's --statistics-out, instead of calibration.")
    ] = None,
    statistics_out: Annotated[
        File, typer.Option("--statistics-out", help="Keep the layers' input statistics (.safetensors).")
    ] = None,
    refit_rounds: Annotated[
        int | None, typer.Option("--refit-rounds", help="gptq: joint fits of a row's scales.", show_default="2")
    ] = None,
    descent_sweeps: Annotated[
        int | None, typer.Option("--descent-sweeps", help="gptq: passes over all codes per fit.", show_default="1")
    ] = None,
    correct_drift: Annotated[
        bool, typer.Option(help="gptq: aim at the original layers' outputs, not at their weights alone.")
    ] = True,
    learn_steps: Annotated[
        int, typer.Option("--learn-steps", help="learned: steps of 512 tokens that scales are trained for.")
    ] = 400,
    train_norms: Annotated[bool, typer.Option("--train-norms", help="learned: train the norms too.")] = False,
    target_bpw: Annotated[
        float | None, typer.Option("--target-bpw", help="Instead of a format: measure, and mix within this size.")
    ] = None,
    max_kld: Annotated[
        float | None,
        typer.Option("--max-kld", help="Instead of a format: the smallest mix with at most this KL divergence."),
    ] = None,
    plan: Annotated[
        File, typer.Option("--plan", help="Of a target: the recipe to write.", show_default="OUT.plan.yaml")
    ] = None,
    plan_work: Annotated[
        File, typer.Option("--plan-work", help="Folder to keep measurements in, for other targets.")
    ] = None,
    measurements: Annotated[
        int | None, typer.Option("--measurements", help="Of a target: the most to make.", show_default="as it takes")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what OUT.quantizing holds.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Report sizes and formats; write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT whatever it is.")] = False,
    threads: Threads = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Quantize a checkpoint to 4, 5 or 8 bits, or to ternary weights."""
    from quantlab.calibration.calibrated import CalibrationOptions
    from quantlab.calibration.learned import LearnSettings
    from quantlab.calibration.quantize import quantize_checkpoint
    from quantlab.calibration.samples import request_of

    check_threads(threads)
    has_target = check_targets(context, target_bpw, max_kld)
    tuning = {"refit_rounds": refit_rounds, "descent_sweeps": descent_sweeps}
    if not correct_drift:
        tuning["correct_drift"] = False
    options = CalibrationOptions(
        request=request_of(calibration, calibration_samples, calibration_length, seed),
        statistics=statistics,
        statistics_out=statistics_out,
        resume=resume,
        dtype=calibration_dtype,
        activations=calibration_activations,
        method_options={name: value for name, value in tuning.items() if value is not None},
    )
    common = {"method": method, "overwrite": overwrite, "dry_run": dry_run, "threads": threads}
    targets = {"target_bpw": target_bpw, "max_kld": max_kld, "plan": plan, "plan_work": plan_work}
    learning = LearnSettings(steps=learn_steps, train_norms=train_norms, seed=seed)
    if has_target:
        chosen = quantize_by_target(
            model, out, calibration=options, learning=learning, measurements=measurements, **targets, **common
        )
        if json:
            print_json(chosen)
        else:
            _print_tables(chosen, out, dry_run)
            print_outcome(chosen, dry_run)
        return
    try:
        with progress("quantizing", "weights") as report:
            result = quantize_checkpoint(
                model,
                out,
                format=format,
                uniform=uniform,
                recipe=recipe,
                method=method,
                levels=levels,
                calibration=options,
                learning=learning,
                overwrite=overwrite,
                dry_run=dry_run,
                threads=threads,
                progress=report,
            )
    except (KeyboardInterrupt, SystemExit):
        _say_how_to_resume(out)
        raise
    for tensor in result.tensors:
        if tensor.note and tensor.weighted_error is not None:
            print(f"note: {tensor.name}: {tensor.note}", file=sys.stderr)
    if json:
        print_json(result)
    else:
        _print_tables(result, out, dry_run)


def _say_how_to_resume(out: Path) -> None:
    from quantlab.calibration.work_folder import work_folder_of

    folder = work_folder_of(out)
    if folder.is_dir():
        print(
            f"note: finished layers are kept in {folder}: the same command with --resume goes on from there",
            file=sys.stderr,
        )


def _print_tables(result: QuantizeReport, out: Path, dry_run: bool) -> None:
    weighted = any(t.weighted_error is not None for t in result.tensors)
    columns = ("tensor", "shape", "format", "relative error", *(["weighted error"] if weighted else []), "")
    rows = [
        (t.name, "x".join(map(str, t.shape)), t.format, f"{t.relative_error:.4f}" if t.relative_error else "",
         *([f"{t.weighted_error:.2e}" if t.weighted_error else ""] if weighted else []), t.note or "")
        for t in result.tensors
    ]  # fmt: skip
    print_table(columns, rows)
    print(
        f"\n{result.parameters / 1e6:.1f} M parameters: {human_bytes(result.source_bytes)} -> "
        f"{human_bytes(result.bytes)}, {result.bits_per_weight:.3f} bits per weight, {result.seconds:.1f} s"
    )
    print_notes(result.notes)
    size = "" if result.file_bytes is None else f", {human_bytes(result.file_bytes)}"
    print(f"dry run: nothing was written (to {out}{size})" if dry_run else f"written: {out}{size}")
