"""What merges of four models tuned to four tasks are worth, method by method, against the literature's ladder.

    python benchmarks/merge_ladder.py [BASE] [--work DIR] [--general TEXT] [--threads N] [--json FILE]
        [--tables ladder,negation,packed] [--methods NAMES] [--packing rtn]

BASE (models/fable-9m) is tuned to the four tasks of merge_tasks.py by `quantlab finetune --method full`, and everything
else is `quantlab merge`. A strength (lambda) is chosen on the tasks' dev rows, what is printed is of the test rows:
losses of the answers alone.

ladder    `share` is a task's (loss of BASE - loss) / (loss of BASE - loss of the model tuned to it), averaged over the
          tasks. `general` is what the perplexity of plain text (--general; the bundled calibration text) came to, x
          BASE's.
negation  BASE less a task's difference, as strong as leaves the general dev windows within 10 %.
packed    Three models in Q4_1 merged by `linear` and packed again, against the float merge packed: divergence of both
          from the float merge on the general text's documents.

Intervals are of 95 %, by drawing rows of every task with replacement 2000 times, the same for all methods. Models,
merges and losses stay in the work folder, and an interrupted run goes on from them.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from calibration_speed import processor
from merge_packed import packed_table
from merge_tasks import TASKS
from merge_work import GENERAL, Losses, Models, texts_by_model
from quantlab.cli.console import print_table, quiet_transformers

SHIPPED = Path(__file__).parents[1] / "models" / "fable-9m"
GENERAL_TEXT = Path(__file__).parents[1] / "quantlab" / "calibration" / "calibration.txt"
TABLES = ("ladder", "negation", "packed")
GRID = [round(0.15 * step, 2) for step in range(11)]  # 0 to 1.5
NEGATED = [0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0, 1.5]
MOST_CONTROL = 1.1  # x BASE's perplexity
DRAWS = 2000
TUNED = "task_arithmetic"  # what the others are compared with


@dataclass(frozen=True)
class Method:
    """A row of the ladder. `strengths` are tried on the dev rows: each model's weight if `of_weight`, else lambda."""

    name: str
    method: str
    strengths: Sequence[float] = (1.0,)
    parameters: tuple[tuple[str, Any], ...] = ()
    of_weight: bool = False


METHODS = (
    Method("average", "linear"),
    Method(TUNED, "task_arithmetic", GRID, of_weight=True),
    Method("ties, untuned", "ties", parameters=(("density", 0.2),)),
    Method("ties", "ties", [0.4, 0.7, 1.0, 1.5, 2.0, 2.5], (("density", 0.2),)),
    Method("ties, trim model", "ties", [0.4, 0.7, 1.0, 1.5, 2.0, 2.5], (("density", 0.2), ("trim", "model"))),
    Method("dare_linear", "dare_linear", [0.15, 0.3, 0.45, 0.6, 0.9], (("density", 0.5),)),
    Method("breadcrumbs", "breadcrumbs", [0.3, 0.45, 0.6, 0.9], (("density", 0.9), ("gamma", 0.01))),
    Method("regmean", "regmean"),
    Method("iso_c", "iso_c", [0.4, 0.7, 1.0, 1.3, 1.6, 2.0]),
    Method("tsv_m", "tsv_m", [0.4, 0.7, 1.0, 1.3, 1.6]),
    Method("wudi", "wudi", [0.7, 1.0, 1.3]),
)
MATRIX_METHODS = ("regmean", "wudi", "iso_c")


@dataclass(frozen=True)
class Rung:
    """A method at its strength: losses of every task's test rows, and of the general text."""

    name: str
    strength: float
    losses: dict[str, Losses]
    general: float
    inside: bool


def main() -> None:
    """Parse, make, score, print."""
    quiet_transformers()
    arguments = parsed()
    models = Models(arguments.base, arguments.general, arguments.work, arguments.threads)
    said: dict[str, Any] = {}
    if "ladder" in arguments.tables:
        said["ladder"] = Ladder(models, arguments.methods).table()
    if "negation" in arguments.tables:
        said["negation"] = negation_table(models)
    if "packed" in arguments.tables:
        said["packed"] = packed_table(models, arguments.packing)
    print(f"{processor()}, {arguments.threads} threads")
    if arguments.json:
        arguments.json.write_text(json.dumps(said, indent=1, allow_nan=False) + "\n")


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("base", type=Path, nargs="?", default=SHIPPED)
    parser.add_argument("--work", type=Path, help="default: out/merge-BASE")
    parser.add_argument("--general", type=Path, default=GENERAL_TEXT)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--tables", type=lambda text: text.split(","), default=list(TABLES))
    parser.add_argument("--methods", type=lambda text: text.split(","), default=[row.name for row in METHODS])
    parser.add_argument("--packing", default="rtn", choices=("rtn", "search", "gptq"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if unknown := set(arguments.tables) - set(TABLES):
        parser.error(f"--tables {','.join(sorted(unknown))}: choose from {', '.join(TABLES)}")
    if unknown := set(arguments.methods) - {row.name for row in METHODS}:
        parser.error(f"--methods {','.join(sorted(unknown))}: choose from {', '.join(row.name for row in METHODS)}")
    arguments.work = arguments.work or Path("out") / f"merge-{arguments.base.resolve().name}"
    return arguments


class Ladder:
    """Every method's merge of all tuned models, at the strength that the dev rows ask for."""

    def __init__(self, models: Models, names: Sequence[str]) -> None:
        self.models, self.methods = models, [row for row in METHODS if row.name in names]
        self.base = {split: self._losses(models.base, split) for split in ("dev", "test")}
        self.tuned = {
            split: {task: models.losses(models.tuned(task), task, split) for task in TASKS} for split in ("dev", "test")
        }
        self.plain = models.losses(models.base, GENERAL, "test").mean

    def table(self) -> dict[str, Any]:
        """Print rungs and gates."""
        rungs = [self.rung(row) for row in self.methods]
        drawn = {rung.name: self.drawn(rung) for rung in rungs}
        rows = [("base", "", *(f"{self.base['test'][task].mean:.3f}" for task in TASKS), "0", "", "1")]
        rows.append(("tuned to the task", "", *(f"{self.tuned['test'][task].mean:.3f}" for task in TASKS), "1", "", ""))
        said = {}
        for rung in sorted(rungs, key=lambda rung: -self.share(rung.losses, "test")):
            interval = np.quantile(drawn[rung.name], [0.025, 0.975])
            against = drawn[rung.name] - drawn[TUNED] if TUNED in drawn else np.zeros(DRAWS)
            difference = [float(value) for value in np.quantile(against, [0.025, 0.5, 0.975])]
            share = self.share(rung.losses, "test")
            rows.append((rung.name, f"{rung.strength:g}", *(f"{rung.losses[task].mean:.3f}" for task in TASKS),
                         f"{share:.3f} ({interval[0]:.3f} to {interval[1]:.3f})",
                         f"{difference[1]:+.3f} ({difference[0]:+.3f} to {difference[2]:+.3f})",
                         f"{rung.general:.2f}"))  # fmt: skip
            said[rung.name] = {
                "strength": rung.strength, "losses": {task: rung.losses[task].mean for task in TASKS}, "share": share,
                "interval": list(map(float, interval)), "less_task_arithmetic": difference, "general": rung.general,
            }  # fmt: skip
        print_table(
            ("merge", "strength", *TASKS, "share of the gain (95 %)", "less task arithmetic's", "general"), rows
        )
        print()
        self.gates({rung.name: rung for rung in rungs}, drawn)
        return said

    def rung(self, row: Method) -> Rung:
        """The strength of the highest dev share; ends of the list are no inner optimum."""
        paths = [self._merge(row, strength) for strength in row.strengths]
        shares = [self.share(self._losses(path, "dev"), "dev") for path in paths]
        best = int(np.argmax(shares))
        plain = self.models.losses(paths[best], GENERAL, "test").mean
        inside = 0 < best < len(paths) - 1
        return Rung(
            row.name, row.strengths[best], self._losses(paths[best], "test"), np.exp(plain - self.plain), inside
        )

    def _merge(self, row: Method, strength: float) -> Path:
        models = [{"model": str(self.models.tuned(task))} for task in TASKS]
        parameters: dict[str, Any] = dict(row.parameters)
        if row.of_weight:
            parameters["weight"] = strength
        elif len(row.strengths) > 1:
            parameters["lambda"] = strength
        config = {"merge_method": row.method, "models": models, "parameters": parameters, "dtype": "float32"}
        if row.method not in ("linear", "regmean"):
            config["base_model"] = str(self.models.base)
        options = {"statistics": texts_by_model(self.models)} if row.method == "regmean" else {}
        name = f"{row.name.replace(', ', '-')}-{strength:g}"
        return self.models.merged(name, config, **options)

    def _losses(self, path: Path, split: str) -> dict[str, Losses]:
        return {task: self.models.losses(path, task, split) for task in TASKS}

    def share(self, losses: dict[str, Losses], split: str) -> float:
        """Of the tuned models' gains, averaged over the tasks."""
        base, tuned = self.base[split], self.tuned[split]
        return float(np.mean([
            (base[task].mean - losses[task].mean) / (base[task].mean - tuned[task].mean) for task in TASKS
        ]))  # fmt: skip

    def drawn(self, rung: Rung) -> np.ndarray:
        """Shares for rows drawn with replacement, fp64 [DRAWS]."""
        random, total = np.random.default_rng(0), np.zeros(DRAWS)
        for task in TASKS:
            rows = len(rung.losses[task].sums)
            weights = random.multinomial(rows, np.full(rows, 1 / rows), DRAWS)
            base, tuned, merged = (weights @ found[task].sums / (weights @ found[task].tokens)
                                   for found in (self.base["test"], self.tuned["test"], rung.losses))  # fmt: skip
            total += (base - merged) / (base - tuned) / len(TASKS)
        return total

    def gates(self, rungs: dict[str, Rung], drawn: dict[str, np.ndarray]) -> None:
        """The ladder of the literature."""
        if TUNED not in rungs:
            return
        rows = []
        if "average" in rungs:
            rows.append(("average < tuned task arithmetic", drawn[TUNED] - drawn["average"]))
        known = [name for name in MATRIX_METHODS if name in rungs]
        if known:
            best = max(known, key=lambda name: self.share(rungs[name].losses, "test"))
            rows.append((f"{best} >= task arithmetic", drawn[best] - drawn[TUNED]))
        top = max(rungs, key=lambda name: self.share(rungs[name].losses, "test"))
        rows.append((f"{top}, the best, < the tuned models", 1 - drawn[top]))
        printed = [(name, f"{np.median(d):+.3f} ({np.quantile(d, 0.025):+.3f} to {np.quantile(d, 0.975):+.3f})",
                    "holds" if np.quantile(d, 0.025) > 0 else "within the interval" if np.quantile(d, 0.975) > 0
                    else "MISSED") for name, d in rows]  # fmt: skip
        strength, inside = rungs[TUNED].strength, rungs[TUNED].inside
        printed.append(("lambda inside (0, 1.5)", f"{strength:g}", "holds" if inside else "MISSED"))
        print_table(("gate", "difference of shares (95 %)", ""), printed)
        print()


def negation_table(models: Models) -> dict[str, Any]:
    """Each task's difference taken away."""
    rows, said = [], {}
    plain = {split: models.losses(models.base, GENERAL, split).mean for split in ("dev", "test")}
    for task in TASKS:
        kept, strength = models.base, 0.0
        for tried in NEGATED:
            path = models.merged(f"less-{task}-{tried:g}", {
                "merge_method": "task_arithmetic", "base_model": str(models.base), "dtype": "float32",
                "models": [{"model": str(models.tuned(task)), "parameters": {"weight": -tried}}],
            })  # fmt: skip
            if np.exp(models.losses(path, GENERAL, "dev").mean - plain["dev"]) > MOST_CONTROL:
                break
            kept, strength = path, tried
        before, after = models.losses(models.base, task, "test"), models.losses(kept, task, "test")
        control = float(np.exp(models.losses(kept, GENERAL, "test").mean - plain["test"]))
        rise = (after.sums - before.sums) / before.tokens.mean()
        error = float(rise.std(ddof=1) / np.sqrt(len(rise)))
        holds = float(rise.mean()) > 1.96 * error and abs(control - 1) < MOST_CONTROL - 1
        verdict = "holds" if holds else "MISSED"
        rows.append((task, f"{strength:g}", f"{before.mean:.3f}", f"{after.mean:.3f}",
                     f"{rise.mean():+.3f} +- {error:.3f}", f"{control:.3f}", verdict))  # fmt: skip
        said[task] = {"strength": strength, "before": before.mean, "after": after.mean, "rise": float(rise.mean()),
                      "stderr": error, "control": control}  # fmt: skip
    print_table(("negated", "strength", "loss of BASE", "loss", "rise", "general, x BASE's", "< 1.1 and a rise"), rows)
    print()
    return said


if __name__ == "__main__":
    main()
