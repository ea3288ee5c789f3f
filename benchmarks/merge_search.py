"""What searching for a merge is worth: weights, layer paths and learned weights on small models of our own.

    python benchmarks/merge_search.py [BASE] [--work DIR] [--general TEXT] [--trials 60] [--path-trials 100]
        [--path-seeds 0] [--orders depth] [--scalings pairs,none] [--rows 400] [--seed 0] [--threads N]
        [--tables search,learned] [--json FILE]

The models are those of merge_ladder.py, which may share its work folder.

search    `whisper` of merge_tasks.py is a task that takes both of what two models were tuned to (`where`, `secret`).
          `quantlab evolve` sees the loss of answers on its dev rows; what is printed is of its test rows. PS: weights
          and densities of a TIES merge of the two; PS+DFS: layer paths through that merge and the better parent, with
          factors (W) where a path leaps, one for each pair of layers or for each place in the path (slots), and
          without, searched anew for each of --path-seeds and --orders (of layers, see `PathSpace`). `W set to 1` is
          the winner with its factors taken out, as in section 4 of arXiv 2403.13187. `untuned` is TIES with equal
          weights and density 0.5.
learned   One merge of all four tuned models, by text: the first `--rows` training rows of every task. The grid is
          task arithmetic with 11 equal weights, the best by that text's loss; `quantlab merge --learn` learns a weight
          for each model and layer from the same text. Seconds are wall time of everything that each side does, and
          `passes` counts tokens times passes forward, a pass back being two. Losses are of the test rows, whole texts.

Intervals are of 95 %, paired over rows. Everything stays in the work folder, and an interrupted run goes on from it.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from calibration_speed import processor
from merge_ladder import GENERAL_TEXT, GRID, SHIPPED
from merge_tasks import COMPOSITE, TASKS, rows
from merge_work import CONTEXT, Losses, Models, scored
from quality_statistics import ratio
from quantlab.cli.console import print_table, progress, quiet_transformers

from quantlab.checkpoint import load_tokenizer
from quantlab.loading import load_model
from quantlab.merging.card import CONFIG_FILE
from quantlab.search.coefficient_training import CoefficientSettings
from quantlab.search.evolve import evolve
from quantlab.search.evolve_config import EvolveConfig, Genome
from quantlab.search.fitness import Term
from quantlab.search.learned_coefficients import learn_merge
from quantlab.search.learning_report import LearningReport
from quantlab.training.prepared import DataSettings, prepare_data

Scaling = Literal["pairs", "slots", "none"]
Order = Literal["depth", "passes"]
PARENTS = ("where", "secret")
WITHOUT = " set to 1"  # behind a path's name: the same with its factors taken out
START = 0.3  # each model's weight before learning
STEPS = 40
STEP_TOKENS = 1024


def main() -> None:
    """Parse, search, learn, print."""
    quiet_transformers()
    arguments = parsed()
    models = Models(arguments.base, arguments.general, arguments.work, arguments.threads)
    said: dict[str, Any] = {}
    if "search" in arguments.tables:
        said["search"] = search_table(models, arguments)
    if "learned" in arguments.tables:
        said["learned"] = learned_table(models, arguments)
    print(f"{processor()}, {arguments.threads} threads")
    if arguments.json:
        arguments.json.write_text(json.dumps(said, indent=1, allow_nan=False) + "\n")


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("base", type=Path, nargs="?", default=SHIPPED)
    parser.add_argument("--work", type=Path, help="default: out/merge-BASE")
    parser.add_argument("--general", type=Path, default=GENERAL_TEXT)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--path-trials", type=int, default=100)
    parser.add_argument("--path-seeds", type=lambda text: [int(word) for word in text.split(",")], default=[0])
    parser.add_argument("--scalings", type=lambda text: text.split(","), default=["pairs", "none"])
    parser.add_argument("--orders", type=lambda text: text.split(","), default=["depth"])
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--tables", type=lambda text: text.split(","), default=["search", "learned"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arguments.work = arguments.work or Path("out") / f"merge-{arguments.base.resolve().name}"
    return arguments


def search_table(models: Models, arguments: argparse.Namespace) -> dict[str, Any]:
    """Print what each search found, on rows that it has not seen."""
    parents = {f"tuned to {task}": models.tuned(task) for task in PARENTS}
    dev = {name: answers(models, path, "dev").mean for name, path in parents.items()}
    better = parents[min(dev, key=lambda name: dev[name])]
    listed = [{"model": str(path)} for path in parents.values()]
    untuned = models.merged("ties-two", {
        "merge_method": "ties", "base_model": str(models.base), "dtype": "float32", "models": listed,
        "parameters": {"weight": 1.0, "density": 0.5},
    })  # fmt: skip
    space = Genome(tuple(map(str, parents.values())), str(models.base), "ties", settings={"dtype": "float32"})
    weights = found(models, "evolved-weights", space, arguments.trials, arguments.seed)
    candidates = {"base": models.base, **parents, "TIES, untuned": untuned, "PS": weights}
    for seed, order, scaling in product(arguments.path_seeds, arguments.orders, arguments.scalings):
        candidates |= layer_paths(models, (weights, better), order, scaling, seed, arguments.path_trials)
    losses = {name: answers(models, path, "test") for name, path in candidates.items()}
    printed, said = [], {}
    for name, loss in losses.items():
        difference, error = ratio(loss.sums - losses["PS"].sums, loss.tokens)
        seen = answers(models, candidates[name], "dev").mean
        printed.append((name, f"{seen:.4f}", f"{loss.mean:.4f}", f"{difference:+.4f} +- {1.96 * error:.4f}"))
        said[name] = {"dev": seen, "test": loss.mean, "less_ps": difference, "reach": 1.96 * error}
    print_table((f"{COMPOSITE}, nats per token", "dev", "test", "less PS's (95 %)"), printed)
    removed = [(name, f"{name}{WITHOUT}") for name in losses if f"{name}{WITHOUT}" in losses]
    for name, without in removed:
        difference, error = ratio(losses[without].sums - losses[name].sums, losses[name].tokens)
        verdict = "holds" if difference - 1.96 * error > 0 else "MISSED"
        print(f"{name}: removing W costs {difference:+.4f} +- {1.96 * error:.4f} (95 %): {verdict}")
        said[name] |= {"removing_w_costs": difference, "removing_w_reach": 1.96 * error}
    print()
    return said


def layer_paths(
    models: Models, through: tuple[Path, Path], order: Order, scaling: Scaling, seed: int, trials: int
) -> dict[str, Path]:
    """The best path through two models that one search finds, and where it has factors, the same path without them."""
    pair = (str(through[0]), str(through[1]))
    genome = Genome(pair, space="layers", order=order, scaling=scaling, settings={"dtype": "float32"})
    folder = f"evolved-paths-{order}-{scaling}-{trials}-s{seed}"
    best = found(models, folder, genome, trials, seed)
    name = f"PS+DFS, {order}, seed {seed}, W: {scaling}"
    if scaling == "none":
        return {name: best}
    config = yaml.safe_load((best / CONFIG_FILE).read_text(encoding="utf-8"))
    for part in config["slices"]:
        part["sources"][0].pop("parameters", None)
    return {name: best, f"{name}{WITHOUT}": models.merged(f"{folder}-unscaled", config)}


def found(models: Models, name: str, genome: Genome, trials: int, seed: int) -> Path:
    """What a search came to."""
    path = models.folder / name
    if not path.exists():
        terms = (Term("call", "answers", function=lambda folder: -answers(models, folder, "dev", keep=False).mean),)
        config = EvolveConfig(genome, terms)
        evolve(config, path, trials=trials, seed=seed, threads=models.threads, stage=stage)
    return path


@contextmanager
def stage(label: str, unit: str) -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar for each."""
    with progress(label, unit) as bar:
        yield bar


def answers(models: Models, path: Path, split: str, *, keep: bool = True) -> Losses:
    """Of the composite task's answers."""
    kept = models.folder / f"{path.name}.{COMPOSITE}-{split}.npz"
    if keep and kept.exists():
        with np.load(kept) as file:
            return Losses(file["sums"], file["tokens"])
    losses = scored(load_model(path).eval(), models.samples[COMPOSITE, split])
    if keep:
        np.savez(kept, sums=losses.sums, tokens=losses.tokens)
    return losses


def learned_table(models: Models, arguments: argparse.Namespace) -> dict[str, Any]:
    """Print learned weights beside the best of the grid."""
    texts = {"seen": models.folder / "all-seen.jsonl", "test": models.folder / "all-test.jsonl"}
    for split, path in texts.items():
        drawn = [row for task in TASKS for row in rows(task)["train" if split == "seen" else "test"]]
        per_task = len(drawn) // len(TASKS)
        chosen = [row for number, row in enumerate(drawn) if split == "test" or number % per_task < arguments.rows]
        path.write_text("".join(json.dumps({"text": row.text}) + "\n" for row in chosen), encoding="utf-8")
    tokenizer, settings = load_tokenizer(models.base), DataSettings(CONTEXT, held_out=0)
    samples = {split: prepare_data(path, tokenizer, None, settings).train for split, path in texts.items()}
    kept = models.folder / f"learned-{arguments.rows}.json"
    said = json.loads(kept.read_text()) if kept.exists() else {}
    if not said:
        tokens = sum(len(sample.input_ids) for sample in samples["seen"])
        grid, by_grid = timed(lambda: best_of_grid(models, samples["seen"]))
        out = models.folder / f"learned-{arguments.rows}"
        learned, report = timed(lambda: learn(models, texts["seen"], out))
        said = {"grid": {"seconds": grid, "passes": len(GRID) * tokens, "path": str(by_grid)},
                "learned": {"seconds": learned, "passes": passes_of(report.learning), "path": str(out)},
                "gain": str(report.learning)}  # fmt: skip
        kept.write_text(json.dumps(said))
    paths = {side: Path(said[side]["path"]) for side in ("grid", "learned")}
    losses = {side: scored(load_model(path).eval(), samples["test"]) for side, path in paths.items()}
    difference, error = ratio(losses["learned"].sums - losses["grid"].sums, losses["grid"].tokens)
    print_table(
        ("all four tasks", "loss", "seconds", "passes"),
        [(paths[side].name, f"{losses[side].mean:.4f}", f"{said[side]['seconds']:.0f}",
          f"{said[side]['passes']:,}") for side in losses],
    )  # fmt: skip
    verdict = "holds" if difference + 1.96 * error < 0 else "MISSED"
    print(f"learned less grid: {difference:+.4f} +- {1.96 * error:.4f} (95 %): {verdict}\n")
    return said | {"losses": {side: loss.mean for side, loss in losses.items()}, "difference": difference,
                   "reach": 1.96 * error}  # fmt: skip


def passes_of(report: LearningReport) -> int:
    """Also of what chooses the best state, and of the proof, which two models read."""
    return 3 * report.trained_tokens + report.evaluated_tokens + 2 * report.report_tokens


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Wall seconds, and the result."""
    started = time.perf_counter()
    result = function()
    return time.perf_counter() - started, result


def equal_weights(models: Models, weight: float) -> dict[str, Any]:
    """Task arithmetic of all tuned models."""
    listed = [{"model": str(models.tuned(task)), "parameters": {"weight": weight}} for task in TASKS]
    return {"merge_method": "task_arithmetic", "base_model": str(models.base), "dtype": "float32", "models": listed}


def best_of_grid(models: Models, samples: list[Any]) -> Path:
    """By the loss of whole texts."""
    paths = [models.merged(f"grid-{weight:g}", equal_weights(models, weight)) for weight in GRID]
    losses = [scored(load_model(path).eval(), samples).mean for path in paths]
    return paths[int(np.argmin(losses))]


def learn(models: Models, text: Path, out: Path) -> Any:
    """`quantlab merge --learn`, from equal weights."""
    settings = CoefficientSettings(by="layer", steps=STEPS, step_tokens=STEP_TOKENS)
    return learn_merge(
        json.dumps(equal_weights(models, START)), out, text, settings, keep_unproven=True, threads=models.threads,
        overwrite=True, stage=stage,
    )  # fmt: skip


if __name__ == "__main__":
    main()
