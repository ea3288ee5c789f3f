"""`quantlab bench MODEL`."""

from __future__ import annotations

from typing import Annotated

import typer
from quantlab.cli.console import check_threads, human_bytes, print_json, print_table, progress
from quantlab.cli.options import Adapters, Config, Json, Model, Threads, weighted_adapters


def bench(
    model: Model,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", help="Tokens of the prompt.")] = 512,
    generate_tokens: Annotated[int, typer.Option("--generate-tokens", help="Tokens to decode behind it.")] = 64,
    repeat: Annotated[int, typer.Option("--repeat", help="Rounds; medians are shown.")] = 3,
    adapter: Adapters = None,
    threads: Threads = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Measure how fast a model runs here, and how near that is to the speed of memory."""
    check_threads(threads)
    adapters = weighted_adapters(adapter)
    from quantlab.evaluation import bench as evaluation

    with progress("benchmark", "rounds") as report:
        result = evaluation.bench(
            model,
            prompt_tokens=prompt_tokens,
            generate_tokens=generate_tokens,
            threads=threads,
            adapters=adapters,
            repeat=repeat,
            progress=report,
        )
    if json:
        print_json(result)
        return
    low, high = result.decode_spread
    least, most = (100 * fraction for fraction in result.fraction_spread)
    rows = [
        ("prefill", f"{result.prefill_tokens_per_second:.1f} tokens/s"),
        ("decode", f"{result.decode_tokens_per_second:.1f} tokens/s ({low:.1f} to {high:.1f})"),
        ("weights read per token", human_bytes(result.weight_bytes_per_token)),
        ("memory reads", f"{result.read_bandwidth_gbps:.1f} GB/s"),
        ("share that decoding takes", f"{100 * result.bandwidth_fraction:.0f} % ({least:.0f} to {most:.0f})"),
        ("peak memory", human_bytes(result.peak_rss_bytes)),
    ]
    print_table((f"{result.engine} engine, {result.kernel} kernel, {result.threads} threads", ""), rows)
