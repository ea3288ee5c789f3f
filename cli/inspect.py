"""`quantlab inspect PATH`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from quantlab.cli.console import human_bytes, print_json, print_table
from quantlab.cli.options import Config, Json, Model

if TYPE_CHECKING:
    from quantlab.calibration.statistics_file import StatisticsSummary


def inspect(path: Model, config: Config = None, json: Json = False) -> None:
    """Show what a checkpoint holds, from headers only, or a file of input statistics."""
    from quantlab.calibration.statistics_file import StatisticsFile, is_statistics
    from quantlab.checkpoint.summary import summarize

    if is_statistics(Path(path)):
        _show_statistics(StatisticsFile(Path(path)).summary(), json)
        return
    result = summarize(path)
    if json:
        print_json(result)
        return
    rows = [(t.name, "x".join(map(str, t.shape)), t.format, human_bytes(t.bytes)) for t in result.tensors]
    print_table(("tensor", "shape", "format", "bytes"), rows)
    print(
        f"\n{result.architecture}: {result.parameters / 1e6:.1f} M parameters, {human_bytes(result.bytes)}, "
        f"{result.bits_per_weight:.3f} bits per weight"
    )


def _show_statistics(result: StatisticsSummary, json: bool) -> None:
    if json:
        print_json(result)
        return
    rows = [
        (", ".join(layer.weights), str(layer.inputs), layer.kind.replace("_", " "), f"{layer.mean_square:.4g}",
         str(layer.dead or ""))
        for layer in result.layers
    ]  # fmt: skip
    print_table(("layers", "inputs", "kind", "mean square", "dead"), rows)
    print(
        f"\ninput statistics for {result.statistics}: {result.tokens} tokens, model {result.model}, "
        f"{human_bytes(result.bytes)}"
    )
