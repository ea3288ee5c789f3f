"""Size and quality of a model in each block format: quantizes, compares with the original on a text, prints a table.

    python benchmarks/formats.py MODEL TEXT [--formats q8_0,q5_1,q4_1,q4_0] [--uniform] [--out out] [--context 512]

Divergence and perplexity come from one lockstep run a format over the same windows; +- is one standard error with
windows as sampling units. The quantized folders stay in the output folder as NAME-FORMAT.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
from pathlib import Path

from quantlab.cli.console import human_bytes, print_table, progress, quiet_transformers

from quantlab.calibration.quantize import quantize_checkpoint
from quantlab.checkpoint import open_checkpoint
from quantlab.evaluation.compare import CompareResult, compare

COLUMNS = ("format", "size", "bits per weight", "perplexity", "KL divergence", "same top token")


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--formats", default="q8_0,q5_1,q4_1,q4_0")
    parser.add_argument("--uniform", action="store_true", help="embedding and head take the format too")
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--context", type=int, default=512)
    arguments = parser.parse_args()
    quiet_transformers()
    original = open_checkpoint(arguments.model)
    bits = 8 * original.nbytes / original.parameters
    rows = []
    for format in arguments.formats.split(","):
        folder = arguments.out / f"{arguments.model.resolve().name}-{format}{'-uniform' if arguments.uniform else ''}"
        report = quantize_checkpoint(arguments.model, folder, format=format, uniform=arguments.uniform)
        with progress(f"comparing {format}", "tokens") as bar:
            result = compare(arguments.model, folder, arguments.text, context=arguments.context, progress=bar)
        if not rows:
            stored = original.config.get("dtype", "original")
            rows.append(
                (str(stored), human_bytes(original.nbytes), f"{bits:.3f}", f"{result.perplexity_a:.3f}", "", "")
            )
        rows.append((format, human_bytes(report.bytes), f"{report.bits_per_weight:.3f}", *_quality(result)))
    print_table(COLUMNS, rows)
    print(
        f"\n{arguments.model} on {arguments.text.name}: {result.tokens} tokens, "
        f"{math.log(result.perplexity_a):.4f} nats per token, context {arguments.context}; "
        f"{platform.machine()}, {os.cpu_count()} cores\n"
    )


def _quality(result: CompareResult) -> tuple[str, str, str]:
    return (
        f"{result.perplexity_b:.3f}",
        f"{result.kld_mean:.6f} +- {result.kld_stderr:.1g}",
        f"{100 * result.same_top:.2f} %",
    )


if __name__ == "__main__":
    main()
