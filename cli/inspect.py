"""`quantlab inspect PATH`."""

from __future__ import annotations

from quantlab.cli.console import human_bytes, print_json, print_table
from quantlab.cli.options import Config, Json, Model


def inspect(path: Model, config: Config = None, json: Json = False) -> None:
    """Show what a checkpoint holds; reads headers only."""
    from quantlab.checkpoint.summary import summarize

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
