"""`quantlab perplexity MODEL TEXT`."""

from __future__ import annotations

from quantlab.cli.console import check_threads, print_json, progress
from quantlab.cli.options import Config, Context, Engine, Json, Model, Stride, Text, Threads


def perplexity(
    model: Model,
    text: Text,
    context: Context = 512,
    stride: Stride = None,
    engine: Engine = "auto",
    threads: Threads = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Measure how well a model predicts a text."""
    check_threads(threads)
    from quantlab.evaluation import perplexity as evaluation

    with progress("perplexity", "tokens") as report:
        result = evaluation.perplexity(
            model, text, context=context, stride=stride, engine=engine, threads=threads, progress=report
        )
    if json:
        print_json(result)
        return
    print(
        f"perplexity {result.perplexity:.4f} +- {result.perplexity_stderr:.4f}  "
        f"({result.nll:.5f} +- {result.stderr:.5f} nats per token, {result.tokens} tokens, {result.engine} engine)"
    )
