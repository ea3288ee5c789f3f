"""How far ternary models trained from scratch are behind float ones at equal tokens, and how that changes with size.

    python benchmarks/bitnet.py DATA --text HELD-OUT.txt [--work DIR] [--layers 1,3,9] [--seeds 1] [--tokens 2000000]
        [--hidden 256] [--intermediate 512] [--heads 8] [--kv-heads 1] [--vocabulary 4096] [--context 256]
        [--batch-tokens 8192] [--micro-batch-tokens 2048] [--learning-rate 2e-3] [--float-rate RATE]
        [--optimizer adamw] [--stages 2] [--bf16] [--threads N] [--json FILE]

For each depth two models of one recipe by `quantlab pretrain`, float and ternary (BitNet b1.58, two-stage schedule), on
the same tokens in the same order, and the float one rounded to ternary. A layer of the default shape has 0.54 M weights
in its linear layers, so that 1, 3 and 9 layers have 0.54, 1.62 and 4.87 M; the embedding, which is float in both, is
not counted. DATA is what `pretrain` takes.

Perplexities are of HELD-OUT, cut into windows, ternary models with int8 activations and float ones with float ones. The
gap is perplexity over the float model's, less 1. Intervals are of 95 %, by drawing windows with replacement, the same
for all models, and seeds, for each size apart, 4000 times; of one seed they do not tell of others. `slope`
is the change of the gap for ten times the parameters. Models and scores stay in the work folder, and an interrupted run
goes on from them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from bitnet_runs import FLOAT, NAIVE, TERNARY, Runs, Settings
from bitnet_statistics import Drawn, gap, gaps_by_seed, ratio, share_shrinking, slope
from calibration_speed import processor
from quantlab.cli.console import print_table, quiet_transformers, use_threads

from quantlab.errors import InputError

GATE_NAIVE = 10.0  # x the gap of the trained ternary model
NO_GAP = "no gap: the float model is behind, try --float-rate"  # nothing to compare with then


@dataclass(frozen=True)
class Size:
    """The models of one depth, all seeds: summed losses, fp64 [seeds, windows], by kind."""

    layers: int
    parameters: int
    losses: dict[str, np.ndarray]
    tokens: np.ndarray

    def perplexity(self, kind: str) -> float:
        """Of all windows; with several seeds the geometric mean."""
        return math.exp(float(self.losses[kind].mean(axis=0).sum() / self.tokens.sum()))

    def gap(self, kind: str) -> Drawn:
        """To the float model."""
        return gap(self.losses[kind], self.losses[FLOAT], self.tokens, self.layers)

    def by_seed(self, kind: str) -> np.ndarray:
        """The same of each seed, fp64 [seeds]."""
        return gaps_by_seed(self.losses[kind], self.losses[FLOAT], self.tokens)


def main() -> None:
    """Parse, train, score, print."""
    quiet_transformers()
    arguments = parsed()
    use_threads(arguments.threads)
    runs = Runs(settings_of(arguments), arguments.work, arguments.threads)
    sizes = [size_of(runs, layers, range(arguments.seeds)) for layers in arguments.layers]
    said = {"sizes": sizes_table(sizes), "trend": trend(sizes), "gates": gates_table(sizes)}
    chosen = runs.settings
    print(
        f"{chosen.tokens:,} tokens a model, {arguments.seeds} seed(s), learning rates {chosen.rates}, "
        f"{chosen.optimizer}, {chosen.stages} stage(s); {chosen.text.name}: {int(runs.tokens.sum()):,} tokens in "
        f"{len(runs.windows)} windows of {chosen.context}\n{processor()}, {arguments.threads} threads"
    )
    if arguments.json:
        machine = f"{processor()}, {arguments.threads} threads"
        arguments.json.write_text(json.dumps(said | {"machine": machine}, indent=1, allow_nan=False) + "\n")


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("data", type=Path, help="text, or folder with train.txt")
    parser.add_argument("--text", type=Path, required=True, help="held-out text to score")
    parser.add_argument("--work", type=Path, default=Path("out") / "bitnet")
    parser.add_argument("--layers", type=lambda text: [int(word) for word in text.split(",")], default=[1, 3, 9])
    parser.add_argument("--seeds", type=int, default=1)
    for option, number in (("tokens", 2_000_000), ("hidden", 256), ("intermediate", 512), ("heads", 8), ("kv-heads", 1),
                           ("vocabulary", 4096), ("context", 256), ("batch-tokens", 8192),
                           ("micro-batch-tokens", 2048), ("stages", 2)):  # fmt: skip
        parser.add_argument(f"--{option}", type=int, default=number)
    parser.add_argument("--warmup", type=float, default=0.05, help="share of the tokens")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--float-rate", type=float, help="of float models; default: the same")
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw")
    parser.add_argument("--bf16", action="store_true", help="autocast; for accelerators")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def settings_of(arguments: argparse.Namespace) -> Settings:
    """What all runs share."""
    rates = {TERNARY: arguments.learning_rate, FLOAT: arguments.float_rate or arguments.learning_rate}
    return Settings(
        arguments.data, arguments.text, arguments.hidden, arguments.intermediate, arguments.heads, arguments.kv_heads,
        arguments.vocabulary, arguments.context, arguments.tokens, arguments.batch_tokens,
        arguments.micro_batch_tokens, round(arguments.warmup * arguments.tokens), rates, arguments.optimizer,
        arguments.stages, arguments.bf16,
    )  # fmt: skip


def size_of(runs: Runs, layers: int, seeds: Sequence[int]) -> Size:
    """Train and score what is missing."""
    kinds = (FLOAT, TERNARY, NAIVE)
    losses = {kind: np.array([runs.nll(layers, kind, seed) for seed in seeds]) for kind in kinds}
    return Size(layers, runs.settings.linear_parameters(layers), losses, runs.tokens)


def sizes_table(sizes: Sequence[Size]) -> list[dict[str, Any]]:
    """Perplexities and gaps."""
    rows, said = [], []
    for size in sizes:
        trained, naive = size.gap(TERNARY), size.gap(NAIVE)
        perplexities = [size.perplexity(kind) for kind in (FLOAT, TERNARY, NAIVE)]
        rows.append((f"{size.parameters / 1e6:.2f} M, {size.layers} layers", *(f"{p:.3f}" for p in perplexities),
                     str(trained), _listed(size.by_seed(TERNARY)), f"{naive.value:.3g}"))  # fmt: skip
        said.append({"layers": size.layers, "parameters": size.parameters, "perplexities": perplexities,
                     "gap": trained.value, "gap_interval": trained.interval, "naive_gap": naive.value,
                     "gap_by_seed": size.by_seed(TERNARY).tolist()})  # fmt: skip
    columns = (
        "linear weights",
        "perplexity, float",
        "ternary",
        "rounded",
        "gap of ternary (95 %)",
        "by seed",
        "of rounded",
    )
    print_table(columns, rows)
    print()
    return said


def trend(sizes: Sequence[Size]) -> dict[str, Any] | None:
    """Whether larger models lose less."""
    if len(sizes) < 2:
        return None
    gaps = [size.gap(TERNARY) for size in sizes]
    found = slope([float(size.parameters) for size in sizes], gaps)
    shrinking = share_shrinking(gaps)
    print(f"slope: {found} for ten times the parameters; each larger model has a smaller gap in {shrinking:.1%} of "
          "the draws\n")  # fmt: skip
    return {"slope": found.value, "slope_interval": found.interval, "shrinking": shrinking}


def gates_table(sizes: Sequence[Size]) -> list[dict[str, Any]]:
    """Rounding without training must be far worse than training; and the trend, which has to be told as it is."""
    rows, said = [], []
    for size in sizes:
        found = ratio(size.gap(NAIVE), size.gap(TERNARY))
        name = f"{size.parameters / 1e6:.2f} M: gap of rounding x that of training"
        behind, (low, high) = math.isfinite(found.value), found.interval
        holds = behind and found.value >= GATE_NAIVE
        verdict = ("holds" if holds else "MISSED") + (", within the interval" if low < GATE_NAIVE <= high else "")
        by_seed = _listed(size.by_seed(NAIVE) / size.by_seed(TERNARY))
        value = f"{found.value:.3g} ({low:.3g} to {high:.3g}; {by_seed})"
        rows.append((name, value, f">= {GATE_NAIVE:g}", verdict if behind else NO_GAP))
        said.append({"name": name, "value": found.value if behind else None, "holds": holds,
                     "interval": [low, high] if math.isfinite(high) else None})  # fmt: skip
    if len(sizes) > 1:
        low, high = slope([float(s.parameters) for s in sizes], [s.gap(TERNARY) for s in sizes]).interval
        all_behind = all(size.gap(TERNARY).value > 0 for size in sizes)
        verdict = "holds" if high < 0 else "MISSED" if low > 0 else "undecided, within the interval"
        verdict = verdict if all_behind else NO_GAP
        rows.append(("gap shrinks with size: slope (95 %)", f"{low:.4f} to {high:.4f}", "< 0", verdict))
        said.append({"name": "slope", "value": [low, high], "holds": all_behind and high < 0})
    print_table(("gate", "value", "bound", ""), rows)
    print()
    return said


def _listed(values: np.ndarray) -> str:
    return ", ".join(f"{value:.3g}" for value in values)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        raise SystemExit(f"error: {error}") from None
