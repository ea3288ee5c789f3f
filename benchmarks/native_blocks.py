"""Speed of the native block conversions, in memory: each kernel, one thread and all cores, per element type.

    python benchmarks/native_blocks.py [--formats q4_1,q8_0] [--elements f32,f16,bf16] [--rows 8192] [--columns 2048]
        [--repeats 15]

"measured" is quantizing with the finite check and the sums for the relative error, as `quantlab quantize` runs it.
Times are medians of the repeats, with the fastest and slowest beside them; GB counts bytes read and bytes written.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from quantlab.cli.console import print_table

from quantlab import native
from quantlab.errors import InputError
from quantlab.formats import BlockFormat, format_named

COLUMNS = ("kernel", "threads", "operation", "format", "element", "G weights/s", "slowest to fastest", "GB/s")


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--formats", default="q4_1,q8_0")
    parser.add_argument("--elements", default="f32,f16,bf16")
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--columns", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    weights = np.random.default_rng(0).normal(0, 0.02, (arguments.rows, arguments.columns)).astype(np.float32)
    rows = []
    for kernel in _kernels():
        for threads in sorted({1, native.default_threads()}):
            for format in map(format_named, arguments.formats.split(",")):
                for element in arguments.elements.split(","):
                    for operation, run, moved in _operations(weights, format, element, threads):
                        rates = _rates(run, weights.size, arguments.repeats)
                        rows.append((kernel, str(threads), operation, format.name, element, *_cells(rates, moved)))
    print_table(COLUMNS, rows)
    print(f"\n{arguments.rows} x {arguments.columns} weights, {arguments.repeats} repeats; {_machine()}\n")


def _kernels() -> Iterator[str]:
    """Each kernel that this processor can run, in force until the next is asked for."""
    for kernel in ("scalar", "avx2"):
        os.environ["QUANTLAB_CPU_KERNEL"] = kernel
        try:
            yield native.cpu_kernel()
        except InputError:
            continue


def _operations(
    weights: np.ndarray, format: BlockFormat, element: str, threads: int
) -> Iterator[tuple[str, Callable[[], object], float]]:
    """(name, what to time, bytes moved per weight)."""
    stored = _stored(weights, element)
    decoded = np.empty_like(stored)
    blocks = native.quantize(format.name, stored, format.levels, element=element)

    def quantize(measure: bool) -> object:
        return native.quantize_checked(
            format.name, stored, format.levels, element=element, measure=measure, threads=threads, out=blocks
        )

    moved = stored.itemsize + format.bits_per_weight / 8
    yield "quantize", lambda: quantize(measure=False), moved
    yield "measured", lambda: quantize(measure=True), moved
    yield (
        "dequantize",
        lambda: native.dequantize(format.name, blocks, element=element, threads=threads, out=decoded),
        moved,
    )


def _stored(weights: np.ndarray, element: str) -> np.ndarray:
    if element == "bf16":
        return (weights.view(np.uint32) >> 16).astype(np.uint16)
    return weights.astype({"f32": np.float32, "f16": np.float16}[element])


def _rates(run: Callable[[], object], weights: int, repeats: int) -> list[float]:
    """Weights per second of each repeat, after one that is not counted."""
    run()
    rates = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        rates.append(weights / (time.perf_counter() - started))
    return rates


def _cells(rates: list[float], bytes_per_weight: float) -> tuple[str, str, str]:
    median = statistics.median(rates)
    spread = f"{min(rates) / 1e9:.2f} to {max(rates) / 1e9:.2f}"
    return f"{median / 1e9:.2f}", spread, f"{median * bytes_per_weight / 1e9:.1f}"


def _machine() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor()
    return (
        f"{name or 'processor unknown'}, {platform.machine()}, {native.default_threads()} cores, numpy {np.__version__}"
    )


if __name__ == "__main__":
    main()
