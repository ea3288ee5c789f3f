"""How much of what rounding loses quantization-aware training wins back, against the gates.

    python benchmarks/qat.py [MODEL] --data TRAIN.txt --text HELD-OUT.txt [--work DIR] [--seeds 3]
        [--formats q4_0,q4_1] [--levels 8,4] [--tables taught,alone,scales] [--tokens 250000] [--context 256]
        [--batch-size 2] [--learning-rate 1e-4] [--scales-rate 5e-3] [--model-tokens N] [--dtype float32]
        [--trained scales,full] [--method gptq] [--temperature 2]
        [--calibration-samples 512] [--device cpu] [--threads N] [--json FILE]

Three tables; every run sees the same tokens in the order that its seed draws.

taught  The teacher is MODEL itself: recovery = 1 - KL_qat / KL_rtn, the divergence from MODEL's predictions left after
        training over that of rounding to nearest, with each of --trained: `full`, and `scales` of the codes that
        --method leaves. --levels adds Q4_1 with fewer codes, a stress test.
alone   No teacher: (loss_ptq - loss_qat) / (loss_ptq - loss_float); `float` is MODEL after the same extra tokens in
        float (`finetune --method full`), `ptq` that model rounded to nearest.
scales  Frozen codes of Q4_1 with a teacher: minimums alone beside scales and minimums.

All files are scored over the same windows of HELD-OUT with float activations. Figures are ratios of sums over windows
and seeds; intervals are of 95 %, paired, with both as units (adapter_statistics.py). Embedding and head are in Q8_0.
Models and scores stay in the work folder, and an interrupted run goes on from them.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from adapter_statistics import Estimate, crossed_ratio
from adapters import SHIPPED, plain
from calibration_speed import processor
from qat_runs import Runs, Settings, Target
from quality_statistics import Scores
from quantlab.cli.console import print_table, quiet_transformers, use_threads

from quantlab.errors import InputError
from quantlab.training.finetune_settings import FinetuneSettings

TABLES = ("taught", "alone", "scales")
SCALES_TARGET = Target("q4_1")
STRESSED = "q4_1"
GATES = {None: 0.8, 8: 0.5, 4: 0.8}  # least recovery by levels; of `taught`
GATE_MINIMUMS = 1.05  # x the divergence that scales and minimums together leave


@dataclass(frozen=True)
class Gate:
    """A figure that has to keep a bound; `sure` where its whole interval does."""

    name: str
    value: str
    bound: str
    holds: bool
    sure: bool

    @property
    def verdict(self) -> str:
        """In a word or two."""
        return ("holds" if self.holds else "MISSED") + ("" if self.sure else ", within the interval")


def main() -> None:
    """Parse, make, score, print."""
    quiet_transformers()
    arguments = parsed()
    use_threads(arguments.threads)
    runs = Runs(settings_of(arguments), arguments.work, arguments.threads, arguments.device)
    targets = [*map(Target, arguments.formats), *(Target(STRESSED, levels) for levels in arguments.levels)]
    said: dict[str, Any] = {}
    gates: list[Gate] = []
    seeds = range(arguments.seeds)
    tables: dict[str, Callable[[], Table]] = {
        "taught": lambda: taught_table(runs, targets, arguments.trained, seeds),
        "alone": lambda: alone_table(runs, targets, seeds),
        "scales": lambda: scales_table(runs, seeds),
    }
    for name, table in tables.items():
        if name in arguments.tables:
            said[name], found = table()
            gates += found
    print_table(("gate", "value (95 %)", "bound", ""), [(g.name, g.value, g.bound, g.verdict) for g in gates])
    print_basis(runs, arguments)
    if arguments.json:
        machine = f"{processor()}, {arguments.threads} threads"
        said |= {"gates": [asdict(gate) for gate in gates], "tokens": runs.settings.tokens, "machine": machine}
        arguments.json.write_text(json.dumps(said, indent=1, allow_nan=False) + "\n")


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("model", type=Path, nargs="?", default=SHIPPED)
    parser.add_argument("--data", type=Path, required=True, help="text to train on")
    parser.add_argument("--text", type=Path, required=True, help="held-out text to score")
    parser.add_argument("--work", type=Path, help="default: out/qat-MODEL")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--formats", type=_words, default=["q4_0", "q4_1"])
    parser.add_argument("--levels", type=_numbers, default=[8, 4], help="of Q4_1; '' for none")
    parser.add_argument("--tables", type=_words, default=list(TABLES))
    parser.add_argument("--tokens", type=int, default=250_000, help="that each run trains on")
    parser.add_argument("--model-tokens", type=int, help="that MODEL was trained on, to print the share")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--trained", type=_words, default=["scales", "full"], help="in the table `taught`")
    parser.add_argument("--method", default="gptq", choices=("rtn", "search", "gptq", "learned"), help="of first codes")
    parser.add_argument("--temperature", type=float, default=2.0, help="of the divergence that is trained on")
    parser.add_argument("--calibration-samples", type=int, default=512, help="windows of 512 tokens for first codes")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--scales-rate", type=float, default=5e-3)
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of activations in training"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if unknown := set(arguments.tables) - set(TABLES):
        parser.error(f"--tables {','.join(sorted(unknown))}: choose from {', '.join(TABLES)}")
    arguments.work = arguments.work or Path("out") / f"qat-{arguments.model.resolve().name}"
    return arguments


def _words(text: str) -> list[str]:
    return text.split(",")


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",") if word]


def settings_of(arguments: argparse.Namespace) -> Settings:
    """What all runs share."""
    rate, of_scales = arguments.learning_rate, arguments.scales_rate
    steps = max(1, arguments.tokens // (arguments.batch_size * arguments.context))
    training = FinetuneSettings(
        context=arguments.context, batch_size=arguments.batch_size, max_steps=steps, eval_every=max(1, steps // 4),
        dtype=arguments.dtype,
    )  # fmt: skip
    rates = {"full": rate, "scales": of_scales, "minimums": of_scales}
    return Settings(
        arguments.model, arguments.data, arguments.text, rates, training, arguments.method, arguments.temperature,
        arguments.calibration_samples,
    )  # fmt: skip


Table = tuple[list[dict[str, Any]], list[Gate]]


def taught_table(runs: Runs, targets: Sequence[Target], ways: Sequence[str], seeds: Sequence[int]) -> Table:
    """Recovery of the divergence from the original."""
    rows, said, gates = [], [], []
    for target, way in product(targets, ways):
        name = f"{target.name}, {way}"
        (rounded,) = runs.scores([runs.rounded(target)])
        start = runs.calibrated(target) if way == "scales" else None
        trained = runs.scores([runs.trained(target, way, seed, taught=True, start=start) for seed in seeds])
        left = _by_seed(trained, "kld")
        base = np.broadcast_to(rounded.kld, left.shape)
        share = crossed_ratio(base - left, base)
        tokens = rounded.tokens
        before, after = float(rounded.kld.sum() / tokens.sum()), float(left.sum() / (len(left) * tokens.sum()))
        rows.append((name, str(len(seeds)), f"{before:.6f}", f"{after:.6f}", str(share),
                     _seeds(1 - left.sum(axis=1) / base.sum(axis=1))))  # fmt: skip
        said.append({"target": target.name, "trained": way, "kld_rtn": before, "kld_qat": after,
                     "recovery": plain(share)})  # fmt: skip
        if (least := GATES.get(target.levels)) is not None:
            gates.append(_at_least(f"{name}, teacher: recovery", share, least))
    columns = ("towards the original", "seeds", "KL, rtn", "KL, qat", "recovery (95 %)", "by seed")
    print_table(columns, rows)
    print()
    return said, gates


def alone_table(runs: Runs, targets: Sequence[Target], seeds: Sequence[int]) -> Table:
    """Recovery of the next-token loss that rounding costs."""
    floats = _by_seed(runs.scores([runs.tuned(seed) for seed in seeds]), "nll")
    rows, said = [], []
    for target in targets:
        scores = runs.scores([runs.tuned_and_rounded(target, seed) for seed in seeds])
        tokens, ptq = scores[0].tokens, _by_seed(scores, "nll")
        trained = _by_seed(runs.scores([runs.trained(target, "full", seed, taught=False) for seed in seeds]), "nll")
        share = crossed_ratio(ptq - trained, ptq - floats)
        losses = [float(some.sum() / (len(some) * tokens.sum())) for some in (floats, ptq, trained)]
        by_seed = (ptq - trained).sum(axis=1) / (ptq - floats).sum(axis=1)
        rows.append((target.name, str(len(seeds)), *(f"{loss:.5f}" for loss in losses), str(share), _seeds(by_seed)))
        names = ("loss_float", "loss_ptq", "loss_qat")
        said.append({"target": target.name, **dict(zip(names, losses, strict=True)), "recovery": plain(share)})
    columns = ("towards the text", "seeds", "loss, float", "ptq", "qat", "recovery (95 %)", "by seed")
    print_table(columns, rows)
    print()
    return said, []


def scales_table(runs: Runs, seeds: Sequence[int]) -> Table:
    """What is left to gain where codes are frozen, and whether minimums alone gain as much."""
    (rounded,) = runs.scores([runs.rounded(SCALES_TARGET)])
    left = {}
    for train in ("scales", "minimums"):
        paths = [runs.trained(SCALES_TARGET, train, seed, taught=True) for seed in seeds]
        left[train] = _by_seed(runs.scores(paths), "kld")
    rows, said = [], []
    for train, found in left.items():
        base = np.broadcast_to(rounded.kld, found.shape)
        share = crossed_ratio(base - found, base)
        mean = float(found.sum() / (len(found) * rounded.tokens.sum()))
        rows.append((train, str(len(seeds)), f"{mean:.6f}", str(share)))
        said.append({"train": train, "kld": mean, "recovery": plain(share)})
    print_table((f"{SCALES_TARGET.name}, codes frozen", "seeds", "KL", "recovery (95 %)"), rows)
    print()
    against = crossed_ratio(left["minimums"], left["scales"])
    sure = not against.low <= GATE_MINIMUMS < against.high
    holds = against.value <= GATE_MINIMUMS
    name = "minimums alone: KL x that of scales and minimums"
    return said, [Gate(name, str(against), f"<= {GATE_MINIMUMS}", holds, sure)]


def _by_seed(scores: Sequence[Scores], figure: str) -> np.ndarray:
    return np.array([getattr(one, figure) for one in scores])


def _at_least(name: str, share: Estimate, least: float) -> Gate:
    sure = share.low >= least or share.high < least
    return Gate(name, str(share), f">= {least:g}", share.value >= least, sure)


def _seeds(values: np.ndarray) -> str:
    return f"{values.min():.4f} to {values.max():.4f}" if len(values) > 1 else ""


def print_basis(runs: Runs, arguments: argparse.Namespace) -> None:
    """What the tables rest on."""
    print("\n" + "\n".join(_basis(runs, arguments)))


def _basis(runs: Runs, arguments: argparse.Namespace) -> Iterator[str]:
    settings, windows = runs.settings, runs.windows
    share = ""
    if arguments.model_tokens:
        share = f" ({100 * settings.tokens / arguments.model_tokens:.1f} % of those that the model was trained on)"
    chosen = settings.training
    yield (f"{settings.data.name}: {settings.tokens:,} tokens a run{share}, {chosen.max_steps} steps of "
           f"{chosen.batch_size} windows of {chosen.context}; learning rates {settings.rates}")  # fmt: skip
    yield f"{settings.text.name}: {sum(window.scored for window in windows):,} tokens in {len(windows)} windows"
    yield f"{processor()}, {arguments.threads} threads, trained on {arguments.device}"


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        raise SystemExit(f"error: {error}") from None
