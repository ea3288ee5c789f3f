"""Time to the first token of a prompt: computed, computed and written to a prompt cache, restored from it.

    python benchmarks/prompt_cache.py WORK_FOLDER [--rounds 5] [--threads 2] [--lengths 32,64,128,256,1000,4000]

The shipped model and one of 346 M parameters with random weights, both in Q4_1 (larger_model.py makes them once). The
model is loaded; what is measured is from the call of `prefill` to the first token drawn. The three ways take turns in
every round; a restored prompt starts with an engine that has forgotten everything, and its files are in the page cache.
The logits must have the same bits each time. Seconds are medians of the rounds, the ratio is the median of the rounds'
ratios of computed to restored, with the least and the largest. A prompt that fills the context is left out.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from pathlib import Path

import numpy as np
from larger_model import machine, packed_models
from quantlab.cli.console import human_bytes, print_table

from quantlab import load_engine
from quantlab.generation.native_engine import NativeEngine
from quantlab.generation.prompt_cache import PromptCache
from quantlab.generation.sampling import SamplingParams

COLUMNS = ("model", "tokens", "on disk", "computed, ms", "and written, ms", "restored, ms", "computed / restored")


def main() -> None:
    """Parse, make the models, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lengths", default="32,64,128,256,1000,4000")
    arguments = parser.parse_args()
    print(machine())
    rows = []
    for name, folder in packed_models(arguments.work).items():
        engine = load_engine(folder, threads=arguments.threads, context=4096)
        for length in map(int, arguments.lengths.split(",")):
            if length < engine.context:
                rows.append(
                    (name, str(length), *measured(engine, length, arguments.work / "prompts", arguments.rounds))
                )
    print_table(COLUMNS, rows)
    print(machine())


def measured(engine: NativeEngine, length: int, folder: Path, rounds: int) -> list[str]:
    """The cells of a row."""
    prompt = np.random.default_rng(length).integers(3, engine.vocabulary, length).tolist()
    times = []
    for _ in range(rounds):
        shutil.rmtree(folder, ignore_errors=True)
        ways = [first_token(engine, prompt, None)]
        ways += [first_token(engine, prompt, PromptCache(folder)) for _ in range(2)]
        if len({bits for _, bits in ways}) != 1:
            raise SystemExit(f"{length} tokens: not the same bits")
        times.append([seconds for seconds, _ in ways])
    size = sum(path.stat().st_size for path in folder.iterdir())
    ratios = [each[0] / each[2] for each in times]
    shutil.rmtree(folder)
    medians = [f"{1000 * statistics.median(each):.1f}" for each in zip(*times, strict=True)]
    return [human_bytes(size), *medians, f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"]


def first_token(engine: NativeEngine, prompt: list[int], cache: PromptCache | None) -> tuple[float, bytes]:
    """Seconds, and the logits that the token was drawn from."""
    engine.rewind(0)
    engine.prompt_cache = cache
    started = time.perf_counter()
    engine.prefill(prompt)
    logits = engine.logits()
    next(engine.decode(SamplingParams(), 1))
    return time.perf_counter() - started, logits.tobytes()


if __name__ == "__main__":
    main()
