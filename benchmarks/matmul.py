"""How fast the native engine multiplies by packed weights: against the memory's speed for one token, and for many.

One token reads each weight once. Its rate is bound by memory where the weights are beyond the caches, so it stands
beside a ruler: the same threads reading as many bytes and doing nothing with them, measured in turns with the product.
Many tokens are bound by arithmetic: a multiply-add counts as two operations.

    python benchmarks/matmul.py
    python benchmarks/matmul.py --types q4_1 --tokens 1,2,4,8,512 --rows 2048 --columns 8192
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from quantlab.cli.console import print_table

from quantlab import native
from quantlab.native import _core

COLUMNS = ("type", "activations", "threads", "tokens", "ms", "GB/s", "ruler GB/s", "of ruler", "GOPS")
FORMATS = {"q4_0": 18, "q4_1": 20, "q5_0": 22, "q5_1": 24, "q8_0": 34, "tq2_0": 66}  # bytes a block
WIDE = {"tq2_0": 256}  # columns of a block; 32 in the others
FLOATS = {"f32": 4, "f16": 2, "bf16": 2}
DECODE = 8  # up to so many tokens the weights come from memory: the matrices take turns


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--types", default="q4_1,q8_0,f16")
    parser.add_argument("--activations", default="int8,f32", help="float types use f32 in any case")
    parser.add_argument("--tokens", default="1,4,512")
    parser.add_argument("--threads", default="")
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--columns", type=int, default=2048)
    parser.add_argument("--memory", type=int, default=256, help="MiB of weights to go through, beyond any cache")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--kernel", default="", help="scalar, avx2 or avx512")
    arguments = parser.parse_args()
    if arguments.kernel:
        os.environ["QUANTLAB_CPU_KERNEL"] = arguments.kernel
    threads = _numbers(arguments.threads) or sorted({1, native.default_threads()})
    rows = []
    for type in arguments.types.split(","):
        weights = Weights(type, arguments.rows, arguments.columns, arguments.memory << 20)
        for activations in ["f32"] if type in FLOATS else arguments.activations.split(","):
            for count in threads:
                for tokens in _numbers(arguments.tokens):
                    rows.append(weights.measured(activations, count, tokens, arguments.repeats))
    print_table(COLUMNS, rows)
    print(f"\n{arguments.rows} x {arguments.columns} weights, medians of {arguments.repeats}; {_machine()}\n")


class Weights:
    """Matrices of one type, as many as fill the memory asked for."""

    def __init__(self, type: str, rows: int, columns: int, memory: int) -> None:
        self.type, self.rows, self.columns = type, rows, columns
        raw = _random_rows(type, rows, columns)
        self.matrices = []
        while not self.matrices or sum(matrix.bytes for matrix in self.matrices) < memory:
            self.matrices.append(_core.PackedMatrix(type, rows, columns))
            self.matrices[-1].fill(0, raw)

    def measured(self, activations: str, threads: int, tokens: int, repeats: int) -> tuple[str, ...]:
        """A row of the table."""
        pool = _core.ThreadPool(threads)
        matrices = self.matrices if tokens <= DECODE else self.matrices[:1]
        moved = sum(matrix.bytes for matrix in matrices)
        multiply = self._multiplication(activations, pool, tokens)
        memory = np.ones((1, moved), np.uint8)

        def run() -> None:
            for matrix in matrices:
                multiply(matrix)

        seconds, ruler = _medians((run, lambda: _core.read_memory(pool, memory)), repeats)
        operations = 2 * tokens * self.rows * self.columns * len(matrices)
        from_memory = tokens <= DECODE
        return (
            self.type,
            activations,
            str(pool.size),
            str(tokens),
            f"{1e3 * seconds / len(matrices):.3f}",
            f"{moved / seconds / 1e9:.1f}" if from_memory else "",
            f"{moved / ruler / 1e9:.1f}" if from_memory else "",
            f"{ruler / seconds:.0%}" if from_memory else "",
            f"{operations / seconds / 1e9:.0f}",
        )

    def _multiplication(
        self, activations: str, pool: _core.ThreadPool, tokens: int
    ) -> Callable[[_core.PackedMatrix], None]:
        values = np.random.default_rng(0).standard_normal((tokens, self.columns)).astype(np.float32)
        out = np.empty((tokens, self.rows), np.float32)
        if activations == "f32":
            return lambda matrix: matrix.multiply_values(pool, values, out, 0, matrix.groups)
        codes = np.empty(values.shape, np.int8)
        if self.type in WIDE:
            scales, sums = (np.empty((tokens, count), np.float32) for count in (1, self.columns // WIDE[self.type]))
            _core.quantize_rows(values, codes, scales, sums)
        else:
            scales, sums = np.empty((2, tokens, self.columns // 32), np.float32)
            _core.quantize_tokens(values, codes, scales, sums)
        return lambda matrix: matrix.multiply_codes(pool, codes, scales, sums, out, 0, matrix.groups)


def _random_rows(type: str, rows: int, columns: int) -> np.ndarray:
    """Rows as files hold them; no scale or weight is subnormal, which would be slow."""
    rng = np.random.default_rng(0)
    if type in FLOATS:
        weights = rng.normal(0, 0.02, (rows, columns)).astype(np.float32)
        if type == "bf16":
            return (weights.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        return weights.astype({"f32": np.float32, "f16": np.float16}[type]).view(np.uint8)
    blocks = rng.integers(0, 256, (rows, columns // WIDE.get(type, 32), FORMATS[type]), dtype=np.uint8)
    upper = {"q4_1": [1, 3], "q5_1": [1, 3], "tq2_0": [65]}.get(type, [1])
    blocks[:, :, upper] = 0x2C  # the upper byte of a half from 1/16 on
    return blocks.reshape(rows, -1)


def _medians(runs: tuple[Callable[[], object], ...], repeats: int) -> list[float]:
    """Seconds of each, measured in turns after a first one that is not counted."""
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats + 1):
        for run, times in zip(runs, seconds, strict=True):
            started = time.perf_counter()
            run()
            times.append(time.perf_counter() - started)
    return [statistics.median(times[1:]) for times in seconds]


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def _machine() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor()
    return f"{name or 'processor unknown'}, {native.default_threads()} cores, {native.cpu_kernel()} kernel"


if __name__ == "__main__":
    main()
