"""N samples of one prompt: drawn together, one after another with the prompt's cache kept, and each from the start.

    python benchmarks/samples.py WORK_FOLDER [--samples 2,4,8] [--rounds 5] [--prompt 512] [--tokens 64] [--threads 2]

The shipped model and one of 346 M parameters with random weights, both in Q4_1 (larger_model.py makes them once), as
`complete_many` and `complete` run them: drawing and decoding to text included, no speculation, end tokens forbidden.
The three take turns in every round and give the same tokens, which is checked. Seconds are medians of the rounds,
ratios medians of the rounds' ratios, with the least and the largest.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from larger_model import machine, packed_models
from quantlab.cli.console import print_table

from quantlab import load_engine, load_tokenizer
from quantlab.checkpoint import Tokenizer
from quantlab.generation.generator import Completion, complete
from quantlab.generation.native_engine import NativeEngine
from quantlab.generation.samples import complete_many
from quantlab.generation.sampling import SamplingParams

COLUMNS = (
    "model",
    "N",
    "together, s",
    "one by one, s",
    "separately, s",
    "one by one / together",
    "separately / together",
)


def main() -> None:
    """Parse, make the models, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--samples", default="2,4,8")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    print(machine())
    rows = []
    for name, folder in packed_models(arguments.work).items():
        context = arguments.prompt + arguments.tokens
        engine, tokenizer = load_engine(folder, threads=arguments.threads, context=context), load_tokenizer(folder)
        for count in map(int, arguments.samples.split(",")):
            rounds = [measure(engine, tokenizer, count, arguments) for _ in range(arguments.rounds)]
            rows.append((name, str(count), *summary(rounds)))
    print_table(COLUMNS, rows)
    print(machine())


def measure(
    engine: NativeEngine, tokenizer: Tokenizer, count: int, arguments: argparse.Namespace
) -> tuple[float, float, float]:
    """Seconds of each way, in one round."""
    prompt = np.random.default_rng(0).integers(3, engine.vocabulary, arguments.prompt).tolist()
    params = SamplingParams(logit_bias=dict.fromkeys(tokenizer.eos, -math.inf))

    def alone(seed: int) -> Completion:
        return complete(
            engine, tokenizer, prompt, max_tokens=arguments.tokens, params=replace(params, seed=seed), speculation="off"
        )

    def separately(seed: int) -> Completion:
        engine.rewind(0)
        return alone(seed)

    ways: list[Callable[[], list[Completion]]] = [
        lambda: complete_many(engine, tokenizer, prompt, count, max_tokens=arguments.tokens, params=params),
        lambda: [alone(seed) for seed in range(count)],
        lambda: [separately(seed) for seed in range(count)],
    ]
    seconds, tokens = [], []
    for way in ways:
        engine.rewind(0)
        started = time.perf_counter()
        found = way()
        seconds.append(time.perf_counter() - started)
        tokens.append([each.token_ids for each in found])
    if tokens[0] != tokens[1] or tokens[1] != tokens[2]:
        raise SystemExit(f"{count} samples: not the same tokens")
    return seconds[0], seconds[1], seconds[2]


def summary(rounds: list[tuple[float, float, float]]) -> list[str]:
    """The cells of a row."""
    medians = [f"{statistics.median(each):.2f}" for each in zip(*rounds, strict=True)]
    ratios = [[each[way] / each[0] for each in rounds] for way in (1, 2)]
    return medians + [f"{statistics.median(r):.2f} ({min(r):.2f} to {max(r):.2f})" for r in ratios]


if __name__ == "__main__":
    main()
