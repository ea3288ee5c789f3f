"""How long the sampler takes for a token, and what it and Python add to a small model's decoding.

Logits are noise with the spread of a language model's, another draw each time. The least of several rounds counts: what
else runs on the machine only adds.

    python benchmarks/sampling.py
    python benchmarks/sampling.py --model models/fable-9m
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
from quantlab.cli.console import print_table

from quantlab.generation.engines import open_engine
from quantlab.generation.sampling import Sampler, SamplingParams

OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
PENALTIES = {"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.5}
SETTINGS = {
    "greedy": SamplingParams(temperature=0),
    "temperature": SamplingParams(**OFF),
    "top-p .95": SamplingParams(**{**OFF, "top_p": 0.95}),
    "top-k 40, top-p .95, min-p .05": SamplingParams(),
    "the same, penalties": SamplingParams(**PENALTIES),
}


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--vocabularies", default="4096,32000,151936")
    parser.add_argument("--history", type=int, default=1000, help="tokens that penalties look at")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--model", help="also decode with this model")
    arguments = parser.parse_args()
    vocabularies = [int(size) for size in arguments.vocabularies.split(",")]
    rows = []
    for name, params in SETTINGS.items():
        times = (draw_time(params, size, arguments.history, arguments.rounds) for size in vocabularies)
        rows.append((name, *(f"{1e6 * seconds:.1f}" for seconds in times)))
    print_table(("us a token", *map(str, vocabularies)), rows)
    if arguments.model:
        print_table(("us a token", arguments.model), decode_times(arguments.model, arguments.rounds))


def draw_time(params: SamplingParams, vocabulary: int, history: int, rounds: int) -> float:
    """Seconds for a draw, the call from Python included."""
    rng = np.random.default_rng(0)
    tables = [rng.normal(0, 3, vocabulary).astype(np.float32) for _ in range(5)]
    tokens = rng.integers(0, vocabulary, history).tolist()
    sampler = Sampler(params, vocabulary)
    return _least(lambda: [sampler.draw(logits, tokens, history) for logits in tables], rounds) / len(tables)


def decode_times(model: str, rounds: int) -> list[tuple[str, str]]:
    """Of the engine alone, of decoding with default settings, and the part that is neither multiplication nor cache."""
    count = 50
    engine = open_engine(model, "native", threads=None)
    prompt = [1, 2, 3, 4]

    def append() -> None:
        engine.prefill(prompt)
        for _ in range(count):
            engine.append([5])

    def decode() -> None:
        engine.prefill(prompt)
        for _ in engine.decode(SamplingParams(), count + 1):
            pass

    alone, together = _least(append, rounds) / count, _least(decode, rounds) / count
    return [
        ("engine.append", f"{1e6 * alone:.1f}"),
        ("engine.decode", f"{1e6 * together:.1f}"),
        ("sampling", f"{1e6 * (together - alone):.1f}"),
    ]


def _least(work: Callable[[], object], rounds: int) -> float:
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


if __name__ == "__main__":
    main()
