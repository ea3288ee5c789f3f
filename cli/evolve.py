"""`quantlab evolve CONFIG.yml OUT`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from quantlab.cli.console import check_threads, print_json, print_notes, print_table, progress
from quantlab.cli.options import Config, Json, Threads

if TYPE_CHECKING:
    from quantlab.search.evolution_file import EvolveResult


def evolve(
    evolve_config: Annotated[
        Path,
        typer.Argument(
            metavar="CONFIG", help="YAML file: genome (models, merge_method ...), fitness, test.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Argument(help="Folder to make.", show_default=False)],
    trials: Annotated[int, typer.Option("--trials", help="Candidates to score, those of all workers together.")] = 100,
    storage: Annotated[
        str | None,
        typer.Option(
            "--storage",
            help="What workers share: a journal file, sqlite:///FILE or postgresql://USER@HOST/DATABASE.",
            show_default="OUT.evolve/study.journal",
        ),
    ] = None,
    sampler: Annotated[str, typer.Option("--sampler", help="cmaes, tpe or random.")] = "cmaes",
    seed: Annotated[int, typer.Option("--seed", help="Of the search, and of merge methods that draw.")] = 0,
    max_ram: Annotated[
        str | None, typer.Option("--max-ram", help="The most memory to merge with: 2GB, 500MB.", show_default="2GB")
    ] = None,
    trust_code: Annotated[
        bool, typer.Option("--trust-code", help="Run the Python functions that the config names.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
    threads: Threads = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Find the merge that scores best: weights of a method, paths through layers, or both. Run it again to go on, or at
    the same time to share the work.
    """
    check_threads(threads)
    from quantlab.search.evolve import evolve as search
    from quantlab.search.evolve import work_folder_of

    try:
        result = search(
            evolve_config,
            out,
            trials=trials,
            storage=storage,
            sampler=sampler,
            seed=seed,
            max_ram=max_ram,
            threads=threads,
            trust_code=trust_code,
            overwrite=overwrite,
            stage=progress,
        )
    except (KeyboardInterrupt, SystemExit):
        kept = storage or str(work_folder_of(out))
        print(f"note: finished trials are kept: the same command goes on from there ({kept})", file=sys.stderr)
        raise
    if json:
        print_json(result)
    else:
        _print_result(result, out)


def _print_result(result: EvolveResult, out: Path) -> None:
    rows = [("best", result.best_score), *result.baseline_scores.items()]
    judged = result.test_scores or {}
    columns = ("", "fitness", *(["test"] if judged else []))
    print_table(columns, [(name, f"{score:.4f}", *([_judged(result, name)] if judged else [])) for name, score in rows])
    failed = f", {result.failed} of them without a score" if result.failed else ""
    print(f"\n{result.trials} trials{failed}, {result.seconds:.1f} s; higher scores are better")
    print_notes(result.notes)
    print(f"written: {out} ({result.layers} layers; merge config: {result.config})")


def _judged(result: EvolveResult, name: str) -> str:
    found = (result.test_scores or {}).get(name)
    if found is None:
        return ""
    return f"{found.score:.4f}" if found.stderr is None else f"{found.score:.4f} +- {found.stderr:.4f}"
