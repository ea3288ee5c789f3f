"""Decode and prefill speed beside llama.cpp's, on GGUF files that `quantlab quantize` and llama.cpp's quantizer made.

    python benchmarks/vs_llama_cpp.py WORK_FOLDER [--rounds 5] [--threads 2] [--prompt 512] [--generate 32]

WORK_FOLDER is that of quantize_speed.py: the 1.1 B model with random weights lies there. Needs llama-cpp-python. Our
Q4_1 and Q8_0 files run in both engines; llama.cpp also runs Q4_0 and Q4_K files of the same model, embedding and head
in Q8_0, beside our Q4_1. Engines take turns in every round (A B A B); tokens are given and nothing is sampled;
llama.cpp is called through llama_decode. Ratios are medians of the rounds' ratios. A second table does the same for
the shipped model, further ones compare our decoding behind short and long contexts.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import llama_cpp
import numpy as np
from quantlab.cli.console import print_table

from quantlab import load_engine, native, quantize_checkpoint
from quantlab.checkpoint.export import export_checkpoint

SHIPPED = Path(__file__).parents[1] / "models" / "fable-9m"
# llama.h's file types, and ggml's element types of embedding and head.
FILE_TYPES = {"q4_0": 2, "q4_k": 14}
Q8_0 = 8


@llama_cpp.llama_log_callback
def SILENCE(level: int, text: bytes, user_data: object) -> None:  # noqa: N802 a constant to its users
    """llama.cpp tells much while it loads."""


Timer = Callable[[], tuple[float, float]]  # seconds of prefill, seconds of decoding


def main() -> None:
    """Parse, make what is missing, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--generate", type=int, default=32)
    parser.add_argument("--long", type=int, default=4096, help="tokens of the long context")
    arguments = parser.parse_args()
    llama_cpp.llama_log_set(SILENCE, ctypes.c_void_p())
    llama_cpp.llama_backend_init()
    work = arguments.work
    compare(arguments, "1.1 B", work / "float16", work, ("q4_1", "q4_0", "q4_k", "q8_0"))
    compare(arguments, "fable-9m", SHIPPED, work, ("q4_1",))
    for kv in ("f16", "q8_0"):
        compare_contexts(arguments, work / "float16-ours.gguf", kv, arguments.long)
    print(f"\n{arguments.rounds} rounds, {arguments.threads} threads, kernel {native.cpu_kernel()}; "
          f"{platform.machine()}, {os.cpu_count()} cores")  # fmt: skip


def compare(arguments: argparse.Namespace, title: str, source: Path, work: Path, formats: tuple[str, ...]) -> None:
    """One table; each engine's speed beside ours in the format that its row of `formats` names."""
    exact = work / f"{source.name}.gguf"
    if not exact.exists():
        export_checkpoint(source, exact, "gguf")
    timers: dict[str, Timer] = {}
    bases: dict[str, str] = {}
    for format in formats:
        name, ours = f"llama.cpp {format}", our_file(source, work, format)
        base = f"quantlab {format}" if ours else "quantlab q4_1"
        if ours:
            timers[base], bases[base] = time_ours(ours, arguments), base
        file = ours or quantized_by_llama(exact, work / f"{source.name}-{format}.gguf", format)
        timers[name], bases[name] = time_llama(file, arguments), base
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in timers}
    for timer in timers.values():
        timer()  # warm
    for _ in range(arguments.rounds):
        for name, timer in timers.items():
            seconds[name].append(timer())
    rows = []
    for name, runs in seconds.items():
        prefill, decode = (statistics.median(run[i] for run in runs) for i in (0, 1))
        ratios = [[run[i] / base[i] for run, base in zip(runs, seconds[bases[name]], strict=True)] for i in (0, 1)]
        told = ["" if bases[name] == name else spread(some) for some in ratios]
        rows.append((name, f"{arguments.prompt / prefill:.1f}", told[0],
                     f"{arguments.generate / decode:.1f}", told[1]))  # fmt: skip
    print_table((title, "prefill t/s", "ours is x faster", "decode t/s", "ours is x faster"), rows)
    print()


def spread(ratios: list[float]) -> str:
    """The median, and all from least to most."""
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def our_file(source: Path, work: Path, format: str) -> Path | None:
    """The GGUF file that both engines run; None for formats that are llama.cpp's alone here."""
    if format not in ("q4_1", "q8_0"):
        return None
    ours = work / (f"{source.name}-ours.gguf" if format == "q4_1" else f"{source.name}-ours-{format}.gguf")
    if not ours.exists():
        quantize_checkpoint(source, ours, format=format)
    return ours


def compare_contexts(arguments: argparse.Namespace, path: Path, kv: str, long: int) -> None:
    """Our decoding behind a short prompt and behind a long one, in turns."""
    lengths = (64, long)
    engines = {length: load_engine(path, threads=arguments.threads, context=length + 64, kv=kv) for length in lengths}
    ids = np.random.default_rng(0).integers(3, 4000, long + 64).tolist()
    for length, engine in engines.items():
        engine.append(ids[:length])
    speeds: dict[int, list[float]] = {length: [] for length in lengths}
    for _ in range(2 * arguments.rounds + 1):
        for length, engine in engines.items():
            engine.rewind(length)
            started = time.perf_counter()
            for token in ids[:16]:
                engine.append([token])
            speeds[length].append(16 / (time.perf_counter() - started))
    shares = [after / before for before, after in zip(*speeds.values(), strict=True)]
    rows = [(str(length), f"{statistics.median(some):.1f}") for length, some in speeds.items()]
    print_table((f"context ({kv} cache)", "decode t/s"), rows)
    print(f"the long context keeps {spread(shares)} of the speed\n")


def quantized_by_llama(source: Path, out: Path, format: str) -> Path:
    """llama.cpp's own file of that type, embedding and head in Q8_0."""
    if not out.exists():
        settings = llama_cpp.llama_model_quantize_default_params()
        settings.ftype, settings.output_tensor_type, settings.token_embedding_type = FILE_TYPES[format], Q8_0, Q8_0
        status = llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(settings))
        if status:
            raise SystemExit(f"llama.cpp cannot quantize {source}")
    return out


def token_ids(arguments: argparse.Namespace) -> list[int]:
    """Any tokens of both vocabularies."""
    return np.random.default_rng(0).integers(3, 4000, arguments.prompt + arguments.generate).tolist()


def time_ours(path: Path, arguments: argparse.Namespace) -> Timer:
    """A round of our engine."""
    ids, prompt = token_ids(arguments), arguments.prompt
    engine = load_engine(path, threads=arguments.threads, context=len(ids))

    def run() -> tuple[float, float]:
        engine.rewind(0)
        started = time.perf_counter()
        engine.append(ids[:prompt])
        prefilled = time.perf_counter()
        for token in ids[prompt:]:
            engine.append([token])
        return prefilled - started, time.perf_counter() - prefilled

    return run


def time_llama(path: Path, arguments: argparse.Namespace) -> Timer:
    """A round of llama.cpp's."""
    ids, prompt = token_ids(arguments), arguments.prompt
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_ubatch = len(ids), prompt, prompt
    settings.n_threads = settings.n_threads_batch = arguments.threads
    context = llama_cpp.llama_init_from_model(model, settings)
    memory = llama_cpp.llama_get_memory(context)

    def decode(tokens: list[int]) -> None:
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(array, len(tokens))):
            raise SystemExit(f"llama.cpp cannot run {path}")

    def run() -> tuple[float, float]:
        llama_cpp.llama_memory_clear(memory, True)
        started = time.perf_counter()
        decode(ids[:prompt])
        prefilled = time.perf_counter()
        for token in ids[prompt:]:
            decode([token])
        return prefilled - started, time.perf_counter() - prefilled

    return run


if __name__ == "__main__":
    main()
