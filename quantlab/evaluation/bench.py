"""How fast a model runs here, and how near that is to the speed of memory."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quantlab import native
from quantlab.adapters.combine import Source as AdapterSource
from quantlab.errors import InputError
from quantlab.generation.native_engine import NativeEngine, load_native

RULER_BYTES = 1 << 30
RULER_PASSES = 5

Progress = Callable[[int, int, str], None]  # (rounds done, rounds in all, the speed so far)


@dataclass(frozen=True)
class BenchResult:
    """Medians over `repeat` rounds. `weight_bytes_per_token` is what one decoded token reads of weights and adapters,
    `read_bandwidth_gbps` what this machine's memory gave the same number of threads right after each round (1e9 bytes a
    second, the best of five passes), `bandwidth_fraction` the share of it that the round's decoding took; small models
    stay in a cache and go beyond 1.
    """

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    decode_spread: tuple[float, float]
    weight_bytes_per_token: int
    read_bandwidth_gbps: float
    bandwidth_fraction: float
    fraction_spread: tuple[float, float]
    peak_rss_bytes: int
    threads: int
    kernel: str
    engine: str


def bench(
    model: str | Path,
    *,
    prompt_tokens: int = 512,
    generate_tokens: int = 64,
    threads: int | None = None,
    repeat: int = 3,
    adapters: Sequence[AdapterSource] | None = None,
    progress: Progress | None = None,
) -> BenchResult:
    """Time a prompt's prefill and the decoding behind it, without sampling; `load_engine` tells of `adapters`.

    Raises:
        InputError: a number below 1, an adapter that does not fit, or a model that the native engine does not run or
            whose context is too short.
    """
    for name, value in (("prompt tokens", prompt_tokens), ("generate tokens", generate_tokens), ("repeat", repeat)):
        if value < 1:
            raise InputError(f"{name} {value}: at least 1 is needed")
    used = threads or native.default_threads()
    engine = load_native(model, threads=used, context=prompt_tokens + generate_tokens, adapters=adapters)
    if engine.context < prompt_tokens + generate_tokens:
        needed = prompt_tokens + generate_tokens
        raise InputError(f"the model's context holds {engine.context} tokens; {needed} are asked for")
    ids = np.random.default_rng(0).integers(0, engine.vocabulary, prompt_tokens + generate_tokens).tolist()
    prefill, decode, bandwidths = [], [], []
    for done in range(repeat):
        speeds = _round(engine, ids, prompt_tokens)
        prefill.append(speeds[0])
        decode.append(speeds[1])
        if done == 0:  # before the ruler takes memory of its own
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        # On a shared machine the memory's speed changes from minute to minute: each round has its own ruler.
        bandwidths.append(native.read_bandwidth(RULER_BYTES, used, RULER_PASSES))
        if progress is not None:
            progress(done + 1, repeat, f"decode {statistics.median(decode):.1f} tokens/s")
    fractions = [speed * engine.weight_bytes / bandwidth for speed, bandwidth in zip(decode, bandwidths, strict=True)]
    return BenchResult(
        prefill_tokens_per_second=statistics.median(prefill),
        decode_tokens_per_second=statistics.median(decode),
        decode_spread=(min(decode), max(decode)),
        weight_bytes_per_token=engine.weight_bytes,
        read_bandwidth_gbps=statistics.median(bandwidths) / 1e9,
        bandwidth_fraction=statistics.median(fractions),
        fraction_spread=(min(fractions), max(fractions)),
        peak_rss_bytes=peak,
        threads=used,
        kernel=native.cpu_kernel(),
        engine=engine.name,
    )


def _round(engine: NativeEngine, ids: list[int], prompt_tokens: int) -> tuple[float, float]:
    """Tokens a second of prefill and of decoding, teacher-forced."""
    engine.rewind(0)
    started = time.perf_counter()
    engine.prefill(ids[:prompt_tokens])
    prefilled = time.perf_counter()
    for token in ids[prompt_tokens:]:
        engine.append([token])
    finished = time.perf_counter()
    return prompt_tokens / (prefilled - started), (len(ids) - prompt_tokens) / (finished - prefilled)
