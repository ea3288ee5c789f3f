"""Memory and speed of fine-tuning a 1.1 B Llama shape: peft, peft with bitsandbytes, and ours on Q4_1, side by side.

    python benchmarks/adapter_speed.py WORK [--steps 3] [--rounds 3] [--threads 2] [--fp32] [--sides NAMES]
        [--json FILE] [--context 512] [--rank 8] [--hidden 2048 --layers 22 --heads 32 --kv-heads 4
        --intermediate 5632 --vocabulary 32000]

Random bf16 weights in that shape (2.2 GB) and their Q4_1 are made once in WORK. Every side trains a LoRA on the
attention's projections with gradient checkpointing, batches of one sample of exactly `context` tokens, the same rows
for all, by transformers' Trainer in a fresh process; sides take turns in every round. One step warms up, `steps` are
timed. Peak memory is the process's VmHWM (resident, files that it maps included), imports and loading too.

    peft-bf16       peft on the bf16 model, bf16 autocast
    peft-fp32       the same in fp32 (with --fp32)
    bnb-nf4         peft on bitsandbytes' NF4 with double quantization, computing in bf16; norms, embedding and head
                    are left in bf16 (prepare_model_for_kbit_training would make them fp32 and cost more)
    quantlab-int8   `quantlab finetune` on Q4_1, packed layers with int8 activations
    quantlab-float  the same with float activations
    quantlab-int8-bf16, quantlab-float-bf16   the same with --dtype bfloat16 (named in --sides only)

Ratios are medians over rounds of the ratio within a round.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapter_speed_sides import SIDES, Job, measure
from calibration_speed import processor
from quantlab.cli.console import print_table, quiet_transformers

PEERS = ("peft-bf16", "bnb-nf4")
DEFAULT_SIDES = (*PEERS, "quantlab-int8", "quantlab-float")
GATE_MEMORY = 0.55  # x peft-bf16
GATE_SPEED, AIM_SPEED = 1.0, 1.3  # x both peers
WORDS_SEED = 7


@dataclass(frozen=True)
class Measured:
    """One side in one round."""

    tokens_per_second: float
    peak_bytes: int


def main() -> None:
    """Parse; make what is missing, measure, print; or be one side."""
    arguments = parsed()
    if arguments.side:
        quiet_transformers()
        job = Job(arguments.work, arguments.steps, arguments.context, arguments.rank)
        print(json.dumps(measure(arguments.side, job)))
        return
    prepare(arguments)
    sides = chosen_sides(arguments)
    found: dict[str, list[Measured]] = {side: [] for side in sides}
    for number in range(arguments.rounds):
        for side in sides:
            found[side].append(run_side(side, arguments))
            speed, peak = found[side][-1].tokens_per_second, found[side][-1].peak_bytes
            print(f"round {number + 1}/{arguments.rounds}: {side} {speed:.1f} tokens/s, {peak / 1e9:.2f} GB",
                  file=sys.stderr, flush=True)  # fmt: skip
    report(found, arguments)


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--sides", help=f"of {', '.join(SIDES)}; default: {', '.join(DEFAULT_SIDES)}")
    parser.add_argument("--fp32", action="store_true", help="peft-fp32 too")
    parser.add_argument("--json", type=Path)
    shape = parser.add_argument_group("shape")
    for option, size in (("hidden", 2048), ("layers", 22), ("heads", 32), ("kv-heads", 4), ("intermediate", 5632),
                         ("vocabulary", 32000)):  # fmt: skip
        shape.add_argument(f"--{option}", type=int, default=size)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    return parser.parse_args()


def chosen_sides(arguments: argparse.Namespace) -> list[str]:
    """Those that can run here."""
    sides = arguments.sides.split(",") if arguments.sides else list(DEFAULT_SIDES)
    if unknown := [side for side in sides if side not in SIDES]:
        raise SystemExit(f"--sides {','.join(unknown)}: choose from {', '.join(SIDES)}")
    if arguments.fp32 and "peft-fp32" not in sides:
        sides.insert(1, "peft-fp32")
    if "bnb-nf4" in sides and importlib.util.find_spec("bitsandbytes") is None:
        sides.remove("bnb-nf4")
        print("bnb-nf4 is left out: bitsandbytes is not installed (pip install 'quantlab[bench]')\n")
    return sides


def config_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """config.json of the shape."""
    from quantize_speed import CONFIG

    return CONFIG | {
        "dtype": "bfloat16", "hidden_size": arguments.hidden, "num_hidden_layers": arguments.layers,
        "num_attention_heads": arguments.heads, "num_key_value_heads": arguments.kv_heads,
        "intermediate_size": arguments.intermediate, "vocab_size": arguments.vocabulary,
    }  # fmt: skip


def prepare(arguments: argparse.Namespace) -> None:
    """The model, its Q4_1, and rows of random words, of which the first `context` tokens are taken."""
    import numpy as np
    from quantize_speed import make_model

    from quantlab import quantize_checkpoint
    from quantlab.checkpoint import load_tokenizer
    from quantlab.training.prepared import prepare_data

    work, config = arguments.work, config_of(arguments)
    job = Job(work, arguments.steps, arguments.context, arguments.rank)
    work.mkdir(parents=True, exist_ok=True)
    note = work / "shape.json"
    if note.exists() and json.loads(note.read_text()) != config:
        raise SystemExit(f"{work}: holds a model of another shape; name another folder")
    note.write_text(json.dumps(config))
    if not job.float_model.exists():
        make_model(job.float_model, config, "BF16")
    if not job.packed_model.exists():
        quantize_checkpoint(job.float_model, job.packed_model, threads=arguments.threads)
    random = np.random.default_rng(WORDS_SEED)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    with job.rows.open("w", encoding="utf-8") as file:
        for _ in range(job.all_steps):
            words = ["".join(random.choice(letters, length)) for length in random.integers(2, 9, arguments.context)]
            file.write(json.dumps({"prompt": "", "completion": " ".join(words)}) + "\n")
    samples = prepare_data(job.rows, load_tokenizer(job.float_model), None, job.data_settings).train
    assert all(len(sample.input_ids) == arguments.context for sample in samples), "a word is at least one token"
    np.save(job.ids, np.array([sample.input_ids for sample in samples]))


def run_side(side: str, arguments: argparse.Namespace) -> Measured:
    """A fresh process."""
    threads = str(arguments.threads)
    command = [sys.executable, __file__, str(arguments.work), "--side", side]
    for option in ("steps", "context", "rank"):
        command += [f"--{option}", str(getattr(arguments, option))]
    environment = os.environ | {"OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryFile("w+") as errors:
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True, check=False)
        errors.seek(0)
        last = errors.read().strip().splitlines()[-3:]
    if done.returncode:
        raise SystemExit(f"{side}: status {done.returncode}: {' / '.join(last)}")
    return Measured(**json.loads(done.stdout.strip().splitlines()[-1]))


def report(found: dict[str, list[Measured]], arguments: argparse.Namespace) -> None:
    """Print the table and the gates; write the JSON."""
    rows, said = [], []
    for side, runs in found.items():
        speeds, peaks = [run.tokens_per_second for run in runs], [run.peak_bytes / 1e9 for run in runs]
        told = [side, spread(peaks, 2), ratio_of(found, side, PEERS[0], "peak_bytes"), spread(speeds, 1)]
        told += [ratio_of(found, side, peer, "tokens_per_second") for peer in PEERS]
        rows.append(told)
        said.append({"side": side, "peak_bytes": [run.peak_bytes for run in runs], "tokens_per_second": speeds})
    print_table(("side", "peak GB", f"x {PEERS[0]}", "tokens/s", *(f"x {peer}" for peer in PEERS)), rows)
    print()
    gates = list(gates_of(found))
    print_table(("gate", "median", "bound", ""), gates)
    machine = f"{processor()}, {arguments.threads} of {os.cpu_count()} cores"
    print(f"\n{arguments.layers} layers of {arguments.hidden}, rank {arguments.rank} on the attention's projections, "
          f"1 x {arguments.context} tokens, {arguments.steps} steps after one, {arguments.rounds} rounds\n"
          f"{machine}")  # fmt: skip
    if arguments.json:
        arguments.json.write_text(json.dumps({"sides": said, "gates": gates, "machine": machine}, indent=1) + "\n")


def ratios(found: dict[str, list[Measured]], side: str, peer: str, figure: str) -> list[float]:
    """One for each round; none where the peer did not run."""
    pairs = zip(found[side], found.get(peer, []), strict=False)
    return [getattr(ours, figure) / getattr(theirs, figure) for ours, theirs in pairs]


def ratio_of(found: dict[str, list[Measured]], side: str, peer: str, figure: str) -> str:
    """For the table."""
    return "" if side == peer or peer not in found else spread(ratios(found, side, peer, figure), 2)


def gates_of(found: dict[str, list[Measured]]) -> list[tuple[str, str, str, str]]:
    """Rows for each of our sides and each peer that ran."""
    rows = []
    for side in (side for side in found if side.startswith("quantlab")):
        for peer in (peer for peer in PEERS if peer in found):
            if peer == PEERS[0]:
                share = statistics.median(ratios(found, side, peer, "peak_bytes"))
                verdict = "holds" if share <= GATE_MEMORY else "MISSED"
                rows.append((f"{side}: peak memory x {peer}", f"{share:.3f}", f"<= {GATE_MEMORY}", verdict))
            share = statistics.median(ratios(found, side, peer, "tokens_per_second"))
            verdict = "MISSED" if share < GATE_SPEED else "holds, aim too" if share >= AIM_SPEED else "holds"
            rows.append((f"{side}: tokens/s x {peer}", f"{share:.3f}", f">= {GATE_SPEED}, aim {AIM_SPEED}", verdict))
    return rows


def spread(values: Sequence[float], digits: int) -> str:
    """The median, and all from least to most."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


if __name__ == "__main__":
    main()
