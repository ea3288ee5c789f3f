"""How much faster ternary weights decode than Q4_1, and how near both are to the speed of memory.

    python benchmarks/ternary_speed.py WORK_FOLDER [--rounds 9] [--threads 2] [--prompt 64] [--generate 32]
        [--json FILE] [--hidden 2048 --inner 5632 --layers 22 --heads 32 --kv-heads 4 --vocabulary 32000]

A Llama shape with random weights, by default TinyLlama's 1.1 B parameters, is made once in WORK_FOLDER (2.2 GB; that
of quantize_speed.py will do) and quantized to both formats, embedding and head in Q8_0 (0.4 and 0.7 GB). Engines take
turns in every round, the first one alternating; tokens are given and nothing is sampled. The ratio is the median of
the rounds' ratios, with the least and the most. Right after each run the same number of threads reads memory as fast
as it gives it: `of bandwidth` is the share of that which the weights read by the run's tokens took. Prefill is that of
a prompt of `--prompt` tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from calibration_speed import processor
from quantize_speed import CONFIG, make_model
from quantlab.cli.console import print_table

from quantlab import load_engine, native, quantize_checkpoint
from quantlab.generation.native_engine import NativeEngine

FORMATS = ("tq2_0", "q4_1")
GATE = 1.5  # x the decoding of Q4_1
RULER_BYTES, RULER_PASSES = 1 << 30, 3


@dataclass(frozen=True)
class Run:
    """Tokens a second of one engine in one round, and the bytes a second that memory gave right after it."""

    prefill: float
    decode: float
    bandwidth: float


def main() -> None:
    """Parse, make what is missing, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=native.default_threads())
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--generate", type=int, default=32)
    parser.add_argument("--ruler", type=int, default=RULER_BYTES, help="bytes that the bandwidth is measured with")
    parser.add_argument("--json", type=Path)
    for name, key in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=CONFIG[key])
    arguments = parser.parse_args()
    engines = {format: engine_of(arguments, format) for format in FORMATS}
    runs = measured(engines, arguments)
    ratios = [ternary.decode / base.decode for ternary, base in zip(*runs.values(), strict=True)]
    print_table(
        ("format", "bytes a token", "prefill t/s", "decode t/s", "least to most", "of bandwidth"),
        [row(format, engines[format], runs[format]) for format in FORMATS],
    )
    median = statistics.median(ratios)
    print(f"\ntq2_0 decodes {spread(ratios)} x as fast as q4_1; gate {GATE}: {'met' if median >= GATE else 'MISSED'}")
    machine = f"kernel {native.cpu_kernel()}; {processor()}, {os.cpu_count()} cores"
    print(f"{arguments.rounds} rounds, {arguments.threads} threads, {machine}")
    if arguments.json:
        told = {"ratio": median, "ratios": ratios, "gate": GATE, "threads": arguments.threads, "processor": processor()}
        told["weight_bytes"] = {format: engine.weight_bytes for format, engine in engines.items()}
        told["runs"] = {format: [asdict(run) for run in found] for format, found in runs.items()}
        arguments.json.write_text(json.dumps(told, indent=2) + "\n")


SIZES = {
    "hidden": "hidden_size",
    "inner": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv-heads": "num_key_value_heads",
    "vocabulary": "vocab_size",
}


def engine_of(arguments: argparse.Namespace, format: str) -> NativeEngine:
    """The model in that format, which is made where it is missing."""
    config = {**CONFIG, **{key: getattr(arguments, name.replace("-", "_")) for name, key in SIZES.items()}}
    is_default = all(config[key] == CONFIG[key] for key in SIZES.values())
    stem = "float16" if is_default else "float16-" + "-".join(str(config[key]) for key in SIZES.values())
    source, packed = arguments.work / stem, arguments.work / f"{stem}-{format}"
    if not source.exists():
        make_model(source, config)
    if not packed.exists():
        quantize_checkpoint(source, packed, format=format)
    return load_engine(packed, threads=arguments.threads, context=arguments.prompt + arguments.generate)


def measured(engines: dict[str, NativeEngine], arguments: argparse.Namespace) -> dict[str, list[Run]]:
    """The rounds' runs of each engine, after one that is not counted."""
    vocabulary = min(engine.vocabulary for engine in engines.values())
    ids = np.random.default_rng(0).integers(3, vocabulary, arguments.prompt + arguments.generate).tolist()
    runs: dict[str, list[Run]] = {format: [] for format in engines}
    for index in range(arguments.rounds + 1):
        order = list(engines) if index % 2 else list(reversed(engines))
        for format in order:
            run = one_run(engines[format], ids, arguments.prompt, arguments.ruler, arguments.threads)
            if index:
                runs[format].append(run)
    return runs


def one_run(engine: NativeEngine, ids: Sequence[int], prompt: int, ruler_bytes: int, threads: int) -> Run:
    """A prompt, the tokens behind it one by one, and the ruler."""
    engine.rewind(0)
    started = time.perf_counter()
    engine.append(ids[:prompt])
    prefilled = time.perf_counter()
    for token in ids[prompt:]:
        engine.append([token])
    ended = time.perf_counter()
    bandwidth = native.read_bandwidth(ruler_bytes, threads, RULER_PASSES)
    return Run(prompt / (prefilled - started), (len(ids) - prompt) / (ended - prefilled), bandwidth)


def row(format: str, engine: NativeEngine, runs: Sequence[Run]) -> tuple[str, ...]:
    """Of the table."""
    decode = [run.decode for run in runs]
    shares = [run.decode * engine.weight_bytes / run.bandwidth for run in runs]
    return (
        format,
        f"{engine.weight_bytes / 1e6:.1f} MB",
        f"{statistics.median(run.prefill for run in runs):.1f}",
        f"{statistics.median(decode):.1f}",
        f"{min(decode):.1f} to {max(decode):.1f}",
        f"{statistics.median(shares):.0%} ({min(shares):.0%} to {max(shares):.0%})",
    )


def spread(ratios: Sequence[float]) -> str:
    """The median, and all from least to most."""
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


if __name__ == "__main__":
    main()
