"""`quantlab compare A B TEXT`."""

from __future__ import annotations

from typing import Annotated

import typer
from quantlab.cli.console import print_json, print_table, progress, quiet_transformers, use_threads
from quantlab.cli.options import Config, Context, Engine, Json, Stride, Text, Threads


def compare(
    a: Annotated[str, typer.Argument(help="Reference model: folder, GGUF file or hub id.", show_default=False)],
    b: Annotated[str, typer.Argument(help="Model to compare with it.", show_default=False)],
    text: Text,
    context: Context = 512,
    stride: Stride = None,
    engine: Engine = "auto",
    threads: Threads = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Measure how far a model's predictions are from a reference model's."""
    use_threads(threads)
    quiet_transformers()
    from quantlab.evaluation import compare as evaluation

    with progress("comparing", "tokens") as report:
        result = evaluation.compare(a, b, text, context=context, stride=stride, progress=report)
    if json:
        print_json(result)
        return
    rows = [
        ("perplexity of A", f"{result.perplexity_a:.4f}"),
        ("perplexity of B", f"{result.perplexity_b:.4f}"),
        ("KL divergence, mean", f"{result.kld_mean:.6f} +- {result.kld_stderr:.6f}"),
        ("KL divergence, median", f"{result.kld_median:.6f}"),
        ("KL divergence, 99th percentile", f"{result.kld_p99:.6f}"),
        ("KL divergence, largest", f"{result.kld_max:.6f}"),
        ("same top token", f"{100 * result.same_top:.3f} % +- {100 * result.same_top_stderr:.3f} %"),
        ("tokens", str(result.tokens)),
    ]
    print_table(("A is the reference; nats per token", ""), rows)
