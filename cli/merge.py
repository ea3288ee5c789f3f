"""`quantlab merge CONFIG.yml OUT`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from quantlab.cli import merge_learning
from quantlab.cli.console import check_threads, human_bytes, print_json, print_notes, print_table, progress
from quantlab.cli.options import Config, Json, Threads

if TYPE_CHECKING:
    from quantlab.merging.conflicts import ConflictReport
    from quantlab.merging.report import MergeReport


def merge(
    merge_config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="YAML file in mergekit's words.", show_default=False)
    ],
    out: Annotated[Path, typer.Argument(help="Folder to make, or GGUF file if it ends in .gguf.", show_default=False)],
    max_ram: Annotated[
        str | None,
        typer.Option("--max-ram", help="The most memory to merge with: 2GB, 500MB, 1.5GiB.", show_default="2GB"),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            "--format", "-f", help="Quantize the output: q4_0, q4_1, q5_0, q5_1, q8_0 or ternary.", show_default="float"
        ),
    ] = None,
    uniform: Annotated[bool, typer.Option("--uniform", help="With --format: embedding and head take it too.")] = False,
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="Instead of --format: a preset (q4_1-mixed ...) or YAML file.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            help="How the output is quantized: rtn, search, gptq or learned.",
            show_default="gptq with --calibration, else rtn",
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option("--calibration", help="Text to quantize with, or .jsonl of text or messages.", show_default=False),
    ] = None,
    statistics: Annotated[
        list[str] | None,
        typer.Option(
            "--statistics",
            metavar="MODEL=FILE",
            help="For regmean: a model's statistics (.safetensors), or a text to collect them with; may be repeated.",
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option("--rank", help="Of the result, where adapters are merged.", show_default="exact, or the largest"),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            "--report", help="Folder for a table and a plot of where the models disagree.", show_default=False
        ),
    ] = None,
    learn: Annotated[
        Path | None,
        typer.Option(
            "--learn",
            metavar="TEXT",
            help="Learn the weights of task_arithmetic or linear from a text, or .jsonl.",
            show_default=False,
        ),
    ] = None,
    learn_by: Annotated[
        str | None,
        typer.Option("--learn-by", help="One weight of each model by model, layer or tensor.", show_default="layer"),
    ] = None,
    learn_steps: Annotated[
        int | None, typer.Option("--learn-steps", help="How many steps to learn.", show_default="40")
    ] = None,
    keep_unproven: Annotated[
        bool, typer.Option("--keep-unproven", help="With --learn: merge even if the gain may be none.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of methods that draw (dare, della), and of --learn.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with what OUT.merging or OUT.learning holds.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, report sizes and memory; write nothing.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
    threads: Threads = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Merge models: float or quantized folders, GGUF files, adapters on any of them."""
    check_threads(threads)
    from quantlab.calibration.calibrated import CalibrationOptions
    from quantlab.calibration.samples import request_of
    from quantlab.merging.merge import merge_checkpoints

    options = None
    if calibration is not None:
        options = CalibrationOptions(request=request_of(calibration, None, None, seed))
    merge_learning.check_options(
        learn is not None,
        {"--learn-by": learn_by, "--learn-steps": learn_steps is not None, "--keep-unproven": keep_unproven},
        {"--statistics": statistics, "--rank": rank is not None},
    )
    merging: dict[str, Any] = {
        "max_ram": max_ram,
        "format": format,
        "uniform": uniform,
        "recipe": recipe,
        "method": method,
        "calibration": options,
        "report": report,
        "threads": threads,
        "overwrite": overwrite,
        "resume": resume,
        "dry_run": dry_run,
    }
    result: MergeReport
    try:
        if learn is not None:
            result = merge_learning.learn(merge_config, out, learn, learn_by, learn_steps, seed, keep_unproven, merging)
        else:
            by_model = _by_model(statistics)
            with progress("merging", "weights") as say:
                result = merge_checkpoints(
                    merge_config, out, statistics=by_model, rank=rank, seed=seed, progress=say, **merging
                )
    except (KeyboardInterrupt, SystemExit):
        merge_learning.say_how_to_resume(out)
        _say_how_to_resume(out)
        raise
    if json:
        print_json(result)
    else:
        _print_result(result, out, dry_run)


def _by_model(given: list[str] | None) -> dict[str, Path]:
    from quantlab.errors import InputError

    found = {}
    for text in given or ():
        model, equals, file = text.rpartition("=")
        if not equals or not model or not file:
            raise InputError(f"--statistics {text}: expected MODEL=FILE")
        found[model] = Path(file)
    return found


def _say_how_to_resume(out: Path) -> None:
    from quantlab.merging.work import work_folder_of

    folder = work_folder_of(out)
    if folder.is_dir():
        print(
            f"note: finished tensors are kept in {folder}: the same command with --resume goes on from there",
            file=sys.stderr,
        )


def _print_result(result: MergeReport, out: Path, dry_run: bool) -> None:
    packed = result.requantization_error is not None
    columns = ("tensor", "shape", "format", *(["requantization error"] if packed else []), "")
    rows = [
        (t.name, "x".join(map(str, t.shape)), t.format,
         *(["" if t.requantization_error is None else f"{t.requantization_error:.4f}"] if packed else []), t.how)
        for t in result.details
    ]  # fmt: skip
    print_table(columns, rows)
    learning = getattr(result, "learning", None)  # of a LearnedMergeReport
    if learning is not None:
        merge_learning.print_learning(learning)
    if result.conflicts is not None and result.conflicts.tensors:
        _print_conflicts(result.conflicts)
    copied = f", {result.copied} of them copied" if result.copied else ""
    print(
        f"\n{result.method}: {result.tensors} tensors{copied}, {result.parameters / 1e6:.1f} M parameters, "
        f"{human_bytes(result.bytes)}, {result.seconds:.1f} s"
    )
    memory = f"memory: {human_bytes(result.memory_bytes)} planned"
    print(memory if dry_run else f"{memory}, {human_bytes(result.peak_rss_bytes)} resident at the peak")
    if packed:
        print(f"requantization error: {result.requantization_error:.4f} of the merged weights")
    print_notes(result.notes)
    print(f"dry run: nothing was written (to {out})" if dry_run else f"written: {out}")


def _print_conflicts(report: ConflictReport) -> None:
    columns = ("tensor", "cosine", "lowest", "signs against", "norm ratio")
    rows = [
        (t.name, _number(t.mean_cosine, "{:.3f}"), _number(t.lowest_cosine, "{:.3f}"), _number(t.conflict, "{:.1%}"),
         _number(t.norm_ratio, "{:.2f}"))
        for t in report.tensors
    ]  # fmt: skip
    print()
    print_table(columns, rows, title="where the models disagree")


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
