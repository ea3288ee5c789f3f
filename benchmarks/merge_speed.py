"""Time and memory of merging three 1.1 B Llama-shaped bf16 models, side by side with mergekit.

    python benchmarks/merge_speed.py WORK [--mergekit mergekit-yaml] [--rounds 3] [--threads 2]
        [--methods linear,task_arithmetic,ties] [--dtype bfloat16] [--layers 22 --hidden 2048 ...] [--json FILE]

A base with random weights and two models that differ from it by noise a tenth as large (2.2 GB each) are made once in
WORK, which needs 12 GB. In every round each side merges by each method, in turns, as a program of its own:
`quantlab merge` and mergekit's `mergekit-yaml` (`pip install mergekit`, in an environment of its own where it and
transformers do not agree), on the same YAML. Seconds are those of the whole command, start-up included; peak is VmHWM,
the largest resident memory, sampled from /proc every 10 ms. Inputs are in the page cache where it holds them. mergekit
writes a model card last, which fails without a network; its time ends when its last weight is written, if that happens.

Results are compared weight by weight (with `--dtype float32` mergekit computes in fp32, as quantlab always does; the
output is bf16 either way): the share of equal bf16 weights, and of those within one unit in the last place.
TIES keeps the same number of weights on both sides, but of equal magnitudes at the edge, of which bf16 has many, each
may keep others.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from calibration_speed import processor
from quantize_speed import CONFIG, make_model
from quantlab.cli.console import print_table

from quantlab.checkpoint import Checkpoint, open_checkpoint, open_writer

MODELS = ("base", "first", "second")
NOISE = 0.1  # of the weights' standard deviation
CONFIGS = {
    "linear": "models:\n{all}\nmerge_method: linear\nparameters: {{normalize: true}}\n",
    "task_arithmetic": "models:\n{tuned}\nmerge_method: task_arithmetic\nbase_model: {base}\n",
    "ties": "models:\n{tuned}\nmerge_method: ties\nbase_model: {base}\nparameters: {{normalize: true}}\n",
}
PARAMETERS = {"linear": "weight: 1.0", "task_arithmetic": "weight: 0.4", "ties": "weight: 1.0, density: 0.2"}
GATES = {"linear": 1.0, "task_arithmetic": 1.0, "ties": 0.3}  # x mergekit's time
GATE_MEMORY = 0.25  # x its memory


@dataclass(frozen=True)
class Measured:
    """One command."""

    seconds: float
    peak_bytes: int


def main() -> None:
    """Parse, make the models, measure, compare, print."""
    arguments = parsed()
    prepare(arguments)
    methods = arguments.methods.split(",")
    found: dict[tuple[str, str], list[Measured]] = {}
    for number in range(arguments.rounds):
        for method in methods:
            for side in ("quantlab", "mergekit") if arguments.mergekit else ("quantlab",):
                measured = merge(side, method, arguments)
                found.setdefault((side, method), []).append(measured)
                print(f"round {number + 1}/{arguments.rounds}: {method}, {side}: {measured.seconds:.1f} s, "
                      f"{measured.peak_bytes / 1e9:.2f} GB", file=sys.stderr, flush=True)  # fmt: skip
    said = report(found, methods, arguments)
    if arguments.mergekit:
        said["equal"] = agreement_table(methods, arguments.work)
    print(
        f"{processor()}, {arguments.threads} of {os.cpu_count()} cores; "
        f"medians of {arguments.rounds} rounds (least to most)"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(said, indent=1) + "\n")


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--mergekit", help="the program mergekit-yaml; left out: ours alone")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--methods", default=",".join(CONFIGS))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of the arithmetic")
    parser.add_argument("--json", type=Path)
    shape = parser.add_argument_group("shape")
    for option, size in (("hidden", 2048), ("layers", 22), ("heads", 32), ("kv-heads", 4), ("intermediate", 5632),
                         ("vocabulary", 32000)):  # fmt: skip
        shape.add_argument(f"--{option}", type=int, default=size)
    arguments = parser.parse_args()
    if unknown := [method for method in arguments.methods.split(",") if method not in CONFIGS]:
        parser.error(f"--methods {','.join(unknown)}: choose from {', '.join(CONFIGS)}")
    return arguments


def prepare(arguments: argparse.Namespace) -> None:
    """The three models, once."""
    work = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    config = CONFIG | {
        "dtype": "bfloat16", "hidden_size": arguments.hidden, "num_hidden_layers": arguments.layers,
        "num_attention_heads": arguments.heads, "num_key_value_heads": arguments.kv_heads,
        "intermediate_size": arguments.intermediate, "vocab_size": arguments.vocabulary,
    }  # fmt: skip
    note = work / "shape.json"
    if note.exists() and json.loads(note.read_text()) != config:
        raise SystemExit(f"{work}: holds models of another shape; name another folder")
    note.write_text(json.dumps(config))
    if not (work / "base").exists():
        make_model(work / "base", config, "BF16")
    base = open_checkpoint(work / "base")
    for seed, name in enumerate(MODELS[1:], start=1):
        if not (work / name).exists():
            make_tuned(base, work / name, seed)


def make_tuned(base: Checkpoint, folder: Path, seed: int) -> None:
    """The base with noise on all weights."""
    random = np.random.default_rng(seed)
    entries = [base.entry(name) for name in base.names]
    with open_writer(folder, entries, dict(base.config), companions=base) as writer:
        for entry in entries:
            weights = base.read(entry.name, torch.float32)
            scale = NOISE * float(weights.std()) if weights.ndim > 1 else NOISE * 0.02
            noise = torch.from_numpy(random.standard_normal(entry.elements, dtype=np.float32))
            writer.write(entry.name, (weights + scale * noise.reshape(weights.shape)).to(torch.bfloat16))


def config_text(method: str, work: Path, dtype: str) -> str:
    """mergekit's YAML."""

    def listed(names: tuple[str, ...]) -> str:
        return "\n".join(
            f"  - model: {(work / name).resolve()}\n    parameters: {{{PARAMETERS[method]}}}" for name in names
        )

    text = CONFIGS[method].format(all=listed(MODELS), tuned=listed(MODELS[1:]), base=(work / MODELS[0]).resolve())
    return text + f"dtype: {dtype}\nout_dtype: bfloat16\n"


def merge(side: str, method: str, arguments: argparse.Namespace) -> Measured:
    """Run one command, whose output stays for `agreement_table`."""
    work, threads = arguments.work, str(arguments.threads)
    config, out = work / f"{method}.yml", work / f"{side}-{method}"
    config.write_text(config_text(method, work, arguments.dtype))
    shutil.rmtree(out, ignore_errors=True)
    environment = os.environ | {"OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
    if side == "quantlab":
        command = [sys.executable, "-m", "quantlab.cli", "merge", str(config), str(out), "--threads", threads, "--json"]
    else:
        command = [arguments.mergekit, str(config), str(out), "--num-threads", threads]
    with tempfile.TemporaryFile("w+") as errors:
        started = time.time()
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, env=environment) as process:
            peak = 0
            while process.poll() is None:
                peak = max(peak, peak_bytes(process.pid))
                time.sleep(0.01)
            seconds = time.time() - started
        errors.seek(0)
        last = errors.read().strip().splitlines()[-3:]
    if process.returncode:
        if side == "quantlab" or not list(out.glob("*.safetensors")):
            raise SystemExit(f"{side}, {method}: status {process.returncode}: {' / '.join(last)}")
        seconds = max(file.stat().st_mtime for file in out.glob("*.safetensors")) - started
    return Measured(seconds, peak)


def peak_bytes(pid: int) -> int:
    """VmHWM of a running process; 0 when it has just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


def report(
    found: dict[tuple[str, str], list[Measured]], methods: list[str], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Print the table and the gates."""
    rows, said = [], {}
    for method in methods:
        ours, theirs = found["quantlab", method], found.get(("mergekit", method), [])
        said[method] = {side: [vars(run) for run in found.get((side, method), [])] for side in ("quantlab", "mergekit")}
        row = [method, spread([run.seconds for run in ours], 1), spread([run.peak_bytes / 1e9 for run in ours], 2)]
        if theirs:
            times = [mine.seconds / other.seconds for mine, other in zip(ours, theirs, strict=True)]
            peaks = [mine.peak_bytes / other.peak_bytes for mine, other in zip(ours, theirs, strict=True)]
            row += [spread([run.seconds for run in theirs], 1), spread([run.peak_bytes / 1e9 for run in theirs], 2),
                    spread(times, 2), _gate(times, GATES[method]),
                    spread(peaks, 2), _gate(peaks, GATE_MEMORY)]  # fmt: skip
        rows.append(row)
    columns = ["merge", "s", "peak GB"]
    if arguments.mergekit:
        columns += ["mergekit s", "peak GB", "x time", "gate", "x memory", "gate"]
    print_table(columns, rows)
    print()
    return said


def _gate(ratios: list[float], gate: float) -> str:
    return f"<= {gate:g} {'holds' if statistics.median(ratios) <= gate else 'MISSED'}"


def spread(values: list[float], digits: int) -> str:
    """The median, and all from least to most."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def agreement_table(methods: list[str], work: Path) -> dict[str, Any]:
    """How many weights of the two sides' last outputs are equal."""
    rows, said = [], {}
    for method in methods:
        equal = near = total = 0
        for ours, theirs in weights_of_both(work / f"quantlab-{method}", work / f"mergekit-{method}"):
            steps = (ordered(ours) - ordered(theirs)).abs()
            equal, near, total = equal + int((steps == 0).sum()), near + int((steps <= 1).sum()), total + steps.numel()
        said[method] = {"equal": equal / total, "within_one": near / total, "weights": total}
        rows.append((method, f"{total:,}", f"{100 * equal / total:.4f} %", f"{100 * near / total:.4f} %"))
    print_table(("result", "weights", "equal", "within 1 ulp"), rows)
    print()
    return said


def weights_of_both(ours: Path, theirs: Path) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """bf16 tensors by name."""
    first, second = open_checkpoint(ours), open_checkpoint(theirs)
    for name in first.names:
        yield first.read(name, torch.bfloat16), second.read(name, torch.bfloat16)


def ordered(weights: torch.Tensor) -> torch.Tensor:
    """bf16 bits as whole numbers that grow with the value, one by one; both zeros are 0."""
    bits = weights.reshape(-1).view(torch.int16).to(torch.int32)
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


if __name__ == "__main__":
    main()
