"""`quantlab quantize` with `--target-bpw` or `--max-kld`: a plan first, then the model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from quantlab.cli.console import progress

if TYPE_CHECKING:
    from quantlab.search.allocate import PlannedReport

EXCLUDED = ("format", "uniform", "recipe", "levels")  # a plan names formats itself; levels test a single one
PLAN_ONLY = ("plan", "plan_work", "measurements")


def check_targets(context: typer.Context, target_bpw: float | None, max_kld: float | None) -> bool:
    """Whether a target was given.

    Raises:
        InputError: two were, or options that say the same or belong to the other way.
    """
    from quantlab.errors import InputError

    given = [n for n, v in (("--target-bpw", target_bpw), ("--max-kld", max_kld)) if v is not None]
    if len(given) == 2:
        raise InputError("--target-bpw and --max-kld exclude each other: give a size or a divergence")
    for name in EXCLUDED if given else PLAN_ONLY:
        if _is_given(context, name):
            option = "--" + name.replace("_", "-")
            if given:
                raise InputError(f"{given[0]} chooses the formats itself; leave {option} out")
            raise InputError(f"{option} goes with --target-bpw or --max-kld")
    return bool(given)


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def quantize_by_target(model: str, out: Path, **options: Any) -> PlannedReport:
    """Run it with a bar for each stage; see `quantize_to_target`."""
    from quantlab.search.allocate import quantize_to_target
    from quantlab.search.plan_work import plan_work_of

    try:
        return quantize_to_target(model, out, stage=progress, **options)
    except (KeyboardInterrupt, SystemExit):
        folder = options.get("plan_work") or plan_work_of(out)
        if folder.is_dir():
            print(f"note: measurements are kept in {folder}: the same command goes on from there", file=sys.stderr)
        raise


def print_outcome(result: PlannedReport, dry_run: bool) -> None:
    """What the plan promised and what came of it."""
    if dry_run:
        print(f"\n{result.plan_text}", end="")
    if result.kld is not None:
        print(
            f"KL divergence {result.kld:.6f} +- {result.kld_stderr:.6f} on held-out windows of the calibration text, "
            f"upper 95 % bound {result.kld_upper:.6f}"
        )
    if result.kld_joint is not None:
        print(
            f"on the windows that were measured: {result.kld_joint:.6f}, sum of the parts {result.kld_sum_of_parts:.6f}"
        )
    if result.plan is not None:
        print(f"plan: {result.plan} (edit it, then: quantlab quantize MODEL OUT --recipe {result.plan})")
