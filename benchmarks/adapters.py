r"""What adapters trained on quantized weights gain, and what fusing leaves of that, against the gates.

    python benchmarks/adapters.py [MODEL] --data NAME=PATH[,PROMPT_FIELD,COMPLETION_FIELD,LAYOUT] [--data ...]
        [--work DIR] [--seeds 3] [--formats q4_1,q8_0,q4_0] [--levels 16,8,4] [--level-seeds 1] [--base-method rtn]
        [--calibration FILE] [--held-out 128] [--rank 8] [--targets attention] [--context 512] [--batch-size 4]
        [--max-steps 200] [--learning-rate 5e-4] [--block-sum-rate RATE] [--merge-aware-rate RATE]
        [--methods lora,block-sum,merge-aware] [--threads N] [--json FILE]

For every data set and seed: a LoRA on the float model, and on its quantized files a QLoRA, a block-sum and a
merge-aware adapter, all with the same rank, steps, rows and order (a seed draws first factors and order; the held-out
rows are always the same). Each adapter is fused: block-sum and merge-aware exactly, a QLoRA by quantizing again, with
rtn and with search. All models are scored on the held-out rows one by one, with int8 activations as training and
generation have them and with float ones; a float model with float ones. LAYOUT is put around the prompt, as in
'Question: {prompt}\nAnswer:'; rows longer than the context are left out. A folder's own valid file is held out.
--methods takes `regrid` too, merge-aware training with --regrid.

Intervals are of 95 %, paired over samples, with samples and seeds as units (adapter_statistics.py). Recovery is the
share of an adapter's gain that its fused file has; `x QLoRA's gain` sets that file's gain against what a QLoRA on the
same base gains before it is fused: a method that fuses without loss may still learn less. Logits are compared over all
held-out positions, and the largest difference of all seeds counts; differing bytes are those of the fused file that
training's own layers did not compute with. `side branch` is a block-sum adapter as peft and llama.cpp apply its files,
without fp16's rounding of minima.

--levels N uses N codes in the blocks of the first format, a stress test with --level-seeds seeds; quantizing again then
has N codes too. Adapters, files and scores stay in the work folder, and an interrupted run goes on from them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from adapter_runs import EXACT, FLOAT, MERGE_AWARE, SIDE, Base, Data, Result, Run, Runs, Settings
from adapter_statistics import Estimate, crossed_ratio, gain, recovery
from calibration_speed import processor
from quantlab.cli.console import print_table, quiet_transformers, use_threads

from quantlab.errors import InputError
from quantlab.training.finetune_settings import FinetuneSettings

SHIPPED = Path(__file__).parents[1] / "models" / "fable-9m"
ALL_LEVELS = 16  # of the four-bit formats
GATE_QLORA = 1.01  # x LoRA's held-out loss
GATE_LOGITS = 1e-2
GATE_RECOVERY = 0.99


@dataclass(frozen=True)
class Group:
    """One method on one base and data set, all seeds."""

    data: Data
    base: Base
    method: str
    results: Sequence[Result]
    before: dict[str, np.ndarray]
    tokens: np.ndarray

    @property
    def name(self) -> str:
        """For tables."""
        method = {"lora": "LoRA" if self.base == FLOAT else "QLoRA"}.get(self.method, self.method)
        return f"{self.data.name}, {self.base.name}, {method}"

    @property
    def models(self) -> list[str]:
        """What was made of the adapters: the ways of fusing, and the side branch."""
        return [name for name in next(iter(self.results[0].losses.values())) if name != "live"]

    def losses(self, model: str, activations: str) -> np.ndarray:
        """Summed loss, fp64 [seeds, samples]."""
        return np.array([result.losses[activations][model] for result in self.results])

    def loss(self, model: str, activations: str) -> float:
        """Nats per token that carries loss, over all seeds."""
        losses = self.losses(model, activations)
        return float(losses.sum() / (len(losses) * self.tokens.sum()))

    def gain(self, activations: str) -> Estimate:
        """Of the adapter that is not fused."""
        return gain(self.before[activations], self.losses("live", activations), self.tokens)

    def recovery(self, model: str, activations: str) -> Estimate | None:
        """Of a fused file."""
        live, fused = self.losses("live", activations), self.losses(model, activations)
        return recovery(self.before[activations], live, fused)

    def of_gain(self, model: str, other: Group | None) -> Estimate | None:
        """A fused file's gain over that of another group's unfused adapters on the same base."""
        if other is None:
            return None
        activations = self.base.activations[0]
        live, fused = other.losses("live", activations), self.losses(model, activations)
        return recovery(self.before[activations], live, fused)

    def logits(self, model: str, activations: str) -> float:
        """The largest difference."""
        return max(result.logits[activations][model] for result in self.results)

    def differing(self) -> int:
        """Bytes of all seeds' exactly fused files."""
        return sum(result.fused[EXACT].differing_bytes or 0 for result in self.results)

    def exact(self, way: str) -> bool:
        """What fuse said."""
        return all(result.fused[way].exact for result in self.results)


@dataclass(frozen=True)
class Gate:
    """A figure that has to keep a bound; `sure` where its whole interval does."""

    name: str
    value: str
    bound: str
    holds: bool
    sure: bool = True

    @property
    def verdict(self) -> str:
        """In a word or two."""
        return ("holds" if self.holds else "MISSED") + ("" if self.sure else ", within the interval")


def main() -> None:
    """Parse, make, score, print."""
    quiet_transformers()
    arguments = parsed()
    use_threads(arguments.threads)
    runs = Runs(settings_of(arguments), arguments.data, arguments.work)
    groups = [group for data in arguments.data for group in all_groups(runs, data, arguments)]
    said = {"trained": trained_table(groups), "fused": fused_table(groups), "gates": gates_table(groups)}
    print_basis(runs, groups, arguments)
    if arguments.json:
        machine = f"{processor()}, {arguments.threads} threads"
        arguments.json.write_text(json.dumps(said | {"machine": machine}, indent=1, allow_nan=False) + "\n")


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("model", type=Path, nargs="?", default=SHIPPED)
    parser.add_argument("--data", type=data_named, action="append", required=True, help="may be repeated")
    parser.add_argument("--work", type=Path, help="default: out/adapters-MODEL")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--formats", type=lambda text: text.split(","), default=["q4_1"])
    parser.add_argument("--levels", type=_numbers, default=[ALL_LEVELS], help="16 is the format itself")
    parser.add_argument("--level-seeds", type=int, default=1, help="for fewer levels")
    parser.add_argument("--base-method", default="rtn", help="of `quantlab quantize`")
    parser.add_argument("--calibration", type=Path, help="text for search; default: the bundled one")
    parser.add_argument("--calibration-samples", type=int)
    parser.add_argument("--held-out", type=int, default=128, help="rows of a file, of a text windows at its end")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--targets", default="attention")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-steps", type=int, default=200)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--block-sum-rate", type=float, help="of block-sum adapters; default: the same")
    parser.add_argument("--merge-aware-rate", type=float, help="of merge-aware ones; default: the same")
    parser.add_argument("--methods", type=lambda text: text.split(","), default=["lora", "block-sum", "merge-aware"])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if unknown := set(arguments.methods) - set(Base("q4_1").methods):
        parser.error(f"--methods {','.join(sorted(unknown))}: choose from {', '.join(Base('q4_1').methods)}")
    arguments.work = arguments.work or Path("out") / f"adapters-{arguments.model.resolve().name}"
    return arguments


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def data_named(text: str) -> Data:
    r"""NAME=PATH[,PROMPT_FIELD,COMPLETION_FIELD,LAYOUT]; the layout may hold commas, and \n for the end of a line."""
    name, equals, rest = text.partition("=")
    path, *fields = rest.split(",", 3)
    if not (name and equals and path) or len(fields) == 1:
        raise argparse.ArgumentTypeError(f"{text}: give NAME=PATH or NAME=PATH,PROMPT_FIELD,COMPLETION_FIELD[,LAYOUT]")
    layout = fields[2].replace("\\n", "\n") if len(fields) == 3 else None
    return Data(name, Path(path), *fields[:2], layout=layout)


def settings_of(arguments: argparse.Namespace) -> Settings:
    """What all runs share."""
    rate = arguments.learning_rate
    aware = dict.fromkeys(MERGE_AWARE, arguments.merge_aware_rate or rate)
    rates = {"lora": rate, "block-sum": arguments.block_sum_rate or rate, **aware}
    training = FinetuneSettings(
        rank=arguments.rank, alpha=2.0 * arguments.rank, targets=arguments.targets, context=arguments.context,
        batch_size=arguments.batch_size, max_steps=arguments.max_steps, eval_every=arguments.max_steps,
    )  # fmt: skip
    return Settings(arguments.model, arguments.base_method, arguments.calibration, arguments.calibration_samples,
                    arguments.held_out, rates, training)  # fmt: skip


def all_groups(runs: Runs, data: Data, arguments: argparse.Namespace) -> Iterator[Group]:
    """The float model, every format, and the first one with fewer levels."""
    formats = arguments.formats
    bases = [FLOAT, *(Base(format) for format in formats)] if ALL_LEVELS in arguments.levels else []
    bases += [Base(formats[0], levels) for levels in arguments.levels if levels != ALL_LEVELS]
    for base in bases:
        seeds = range(arguments.seeds if base.levels is None else arguments.level_seeds)
        for method in (method for method in base.methods if method in arguments.methods):
            results = [runs.result(Run(data, base, method, seed)) for seed in seeds]
            yield Group(data, base, method, results, runs.before(data, base), runs.tokens(data))


def trained_table(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Held-out losses before and after training."""
    rows, said = [], []
    for group in groups:
        for activations in group.base.activations:
            before = float(group.before[activations].sum() / group.tokens.sum())
            after, gained = group.loss("live", activations), group.gain(activations)
            seeds = len(group.results)
            speed = float(np.median([result.tokens_per_second for result in group.results]))
            rows.append((group.name, activations, str(seeds), f"{before:.4f}", f"{after:.4f}", str(gained),
                         f"{group.results[0].trainable_parameters:,}", f"{speed:.0f}"))  # fmt: skip
            said.append({"run": group.name, "activations": activations, "seeds": seeds, "before": before,
                         "after": after, "gain": plain(gained), "tokens_per_second": speed})  # fmt: skip
    print_table(("held-out loss, nats per token", "activations", "seeds", "before", "after", "gain (95 %)",
                 "trained", "tokens/s"), rows)  # fmt: skip
    print()
    return said


def fused_table(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """What fusing made of them."""
    rows, said = [], []
    for group in groups:
        plain_lora = sibling(group, groups, group.base)
        for model in group.models:
            found: dict[str, Any] = {"run": group.name, "fused": model}
            found |= {} if model == SIDE else {"exact": group.exact(model)}
            found |= {"differing_bytes": group.differing()} if model == EXACT else {}
            shares = [group.recovery(model, a) for a in group.base.activations]
            for activations, share in zip(group.base.activations, shares, strict=True):
                found[f"loss_{activations}"] = group.loss(model, activations)
                found[f"logits_{activations}"] = group.logits(model, activations)
                found[f"recovery_{activations}"] = plain(share)
            of_lora = group.of_gain(model, plain_lora)
            said.append(found | {"of_qlora_gain": plain(of_lora)})
            exact = {True: "yes", False: "no"}.get(found.get("exact"), "")
            logits = [f"{found[f'logits_{a}']:.2g}" for a in group.base.activations]
            rows.append((group.name, model, exact, str(found.get("differing_bytes", "")), f"{found['loss_int8']:.4f}",
                         *logits, *map(_said, shares), _said(of_lora)))  # fmt: skip
    print_table(("fused", "how", "exact", "bytes differ", "loss, int8", "logits, int8", "float",
                 "recovery, int8 (95 %)", "float", "x QLoRA's gain, int8"), rows)  # fmt: skip
    print()
    return said


def sibling(group: Group, groups: Sequence[Group], base: Base) -> Group | None:
    """The plain LoRA on the same data and `base`, with the same seeds, if there is one."""
    return next((g for g in groups if (g.data, g.base, g.method) == (group.data, base, "lora")
                 and len(g.results) == len(group.results)), None)  # fmt: skip


def _said(estimate: Estimate | None) -> str:
    return "no gain" if estimate is None else str(estimate)


def plain(estimate: Estimate | None) -> dict[str, float | None] | None:
    """For JSON, which has no NaN."""
    if estimate is None:
        return None
    return {key: value if math.isfinite(value) else None for key, value in dataclasses.asdict(estimate).items()}


def gates_table(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Every gate that the runs have figures for."""
    gates = [gate for group in groups for gate in gates_of(group, groups)]
    rows = [(gate.name, gate.value, gate.bound, gate.verdict) for gate in gates]
    print_table(("gate", "value (95 %)", "bound", ""), rows)
    missed = sum(not gate.holds for gate in gates)
    print(f"{len(gates) - missed} of {len(gates)} gates hold\n")
    return [dataclasses.asdict(gate) for gate in gates]


def gates_of(group: Group, groups: Sequence[Group]) -> Iterator[Gate]:
    """Those of one method on one base."""
    gained = group.gain(group.base.activations[0])
    yield Gate(f"{group.name}: gain", str(gained), "> 0", gained.low > 0)
    floats = sibling(group, groups, FLOAT)
    if group.method == "lora" and group.base.format and group.base.levels is None and floats is not None:
        for activations in group.base.activations:
            share = crossed_ratio(group.losses("live", activations), floats.losses("live", "float"))
            holds, sure = share.value <= GATE_QLORA, not share.low <= GATE_QLORA < share.high
            told = f"{share} +- {share.stderr:.4f}"
            yield Gate(f"{group.name}, {activations}: loss x LoRA's", told, f"<= {GATE_QLORA}", holds, sure)
    if EXACT in group.models:
        yield from exact_gates(group)


def exact_gates(group: Group) -> Iterator[Gate]:
    """What is promised of the two kinds that fuse without loss."""
    largest = max(group.logits(EXACT, activations) for activations in group.base.activations)
    yield Gate(
        f"{group.name}: logits, fused - unfused", f"{largest:.2g}", f"<= {GATE_LOGITS:g}", largest <= GATE_LOGITS
    )
    differing = group.differing()
    yield Gate(f"{group.name}: differing bytes", str(differing), "0", differing == 0)
    exact = group.exact(EXACT)
    yield Gate(f"{group.name}: fuse says exact", "yes" if exact else "no", "yes", exact)
    for activations in group.base.activations:
        share = group.recovery(EXACT, activations)
        name, bound = f"{group.name}, {activations}: recovery", f">= {GATE_RECOVERY}"
        if share is None:
            yield Gate(name, "no gain", bound, False)
        else:
            sure = share.low >= GATE_RECOVERY or share.high < GATE_RECOVERY
            yield Gate(name, str(share), bound, share.value >= GATE_RECOVERY, sure)


def print_basis(runs: Runs, groups: Sequence[Group], arguments: argparse.Namespace) -> None:
    """What the tables rest on."""
    for data in arguments.data:
        samples = runs.held_out(data)
        print(f"{data.name}: {data.path.name}, {len(samples)} held-out samples, "
              f"{int(runs.tokens(data).sum()):,} tokens that carry loss")  # fmt: skip
    losses = [(r.eval_loss, sum(r.losses[g.base.activations[0]]["live"]) / g.tokens.sum()) for g in groups
              for r in g.results]  # fmt: skip
    apart = max(abs(reported - found) for reported, found in losses)
    chosen = runs.settings.training
    print(f"largest difference of these losses to those that training reported: {apart:.2g} nats per token\n"
          f"{chosen.max_steps} steps of {chosen.batch_size} samples, rank {chosen.rank} on {chosen.targets}, "
          f"learning rates {runs.settings.rates}, bases by {runs.settings.base_method}\n"
          f"{processor()}, {arguments.threads} threads")  # fmt: skip


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        raise SystemExit(f"error: {error}") from None
