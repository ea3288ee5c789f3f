"""`quantlab perplexity MODEL TEXT`."""

from __future__ import annotations

from typing import Annotated

import typer
from quantlab.cli.console import check_threads, print_json, progress
from quantlab.cli.options import (
    Activations,
    Adapters,
    Config,
    Context,
    Engine,
    Json,
    Model,
    Stride,
    Text,
    Threads,
    Windows,
    weighted_adapters,
)


def perplexity(
    model: Model,
    text: Text,
    context: Context = 512,
    stride: Stride = None,
    windows: Windows = "documents",
    activations: Activations = "f32",
    kv: Annotated[
        str | None,
        typer.Option(
            "--kv", help="Cache elements: f32, f16 or q8_0.", show_default="f32 with f32 activations, else f16"
        ),
    ] = None,
    engine: Engine = "auto",
    adapter: Adapters = None,
    threads: Threads = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Measure how well a model predicts a text."""
    check_threads(threads)
    adapters = weighted_adapters(adapter)
    from quantlab.evaluation import perplexity as evaluation

    with progress("perplexity", "tokens") as report:
        result = evaluation.perplexity(
            model,
            text,
            context=context,
            stride=stride,
            windows=windows,
            engine=engine,
            activations=activations,
            kv=kv,
            threads=threads,
            adapters=adapters,
            progress=report,
        )
    if json:
        print_json(result)
        return
    print(
        f"perplexity {result.perplexity:.4f} +- {result.perplexity_stderr:.4f}  "
        f"({result.nll:.5f} +- {result.stderr:.5f} nats per token, {result.tokens} tokens in {result.windows} windows, "
        f"{result.engine} engine)"
    )
