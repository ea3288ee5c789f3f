"""`quantlab compare A B TEXT`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from quantlab.cli.console import check_threads, print_json, print_table, progress
from quantlab.cli.options import (
    Activations,
    Config,
    Context,
    Engine,
    Json,
    Stride,
    Text,
    Threads,
    Windows,
    weighted_adapters,
)

from quantlab.errors import one_line

if TYPE_CHECKING:
    from quantlab.evaluation.compare import CompareResult

MOST_DOCUMENTS = 20  # rows of the table; --json has them all
CACHE_DEFAULT = "f32 with f32 activations, else f16"


def compare(
    a: Annotated[str, typer.Argument(help="Reference model: folder, GGUF file or hub id.", show_default=False)],
    b: Annotated[str, typer.Argument(help="Model to compare with it.", show_default=False)],
    text: Text,
    context: Context = 512,
    stride: Stride = None,
    windows: Windows = "documents",
    activations: Activations = "f32",
    activations_a: Annotated[
        str | None, typer.Option("--activations-a", help="Of A alone.", show_default="--activations")
    ] = None,
    activations_b: Annotated[
        str | None, typer.Option("--activations-b", help="Of B alone.", show_default="--activations")
    ] = None,
    kv_a: Annotated[
        str | None, typer.Option("--kv-a", help="A's cache: f32, f16 or q8_0.", show_default=CACHE_DEFAULT)
    ] = None,
    kv_b: Annotated[str | None, typer.Option("--kv-b", help="B's cache.", show_default=CACHE_DEFAULT)] = None,
    adapter_a: Annotated[
        list[str] | None,
        typer.Option("--adapter-a", metavar="DIR[=WEIGHT]", help="Apply an adapter to A; may be repeated."),
    ] = None,
    adapter_b: Annotated[
        list[str] | None, typer.Option("--adapter-b", metavar="DIR[=WEIGHT]", help="The same for B.")
    ] = None,
    worst: Annotated[int, typer.Option("--worst", help="Tokens of largest divergence to show.")] = 10,
    report: Annotated[
        Path | None,
        typer.Option(
            "--report", help="Draw the comparison: OUT.html, or a folder of PNGs.", metavar="OUT", show_default=False
        ),
    ] = None,
    engine: Engine = "auto",
    threads: Threads = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Measure how far a model's predictions are from a reference model's."""
    check_threads(threads)
    adapters_a, adapters_b = weighted_adapters(adapter_a, "--adapter-a"), weighted_adapters(adapter_b, "--adapter-b")
    from quantlab.evaluation import compare as evaluation
    from quantlab.evaluation.report import check_report, write_report

    if report is not None:
        check_report(report)
    with progress("comparing", "tokens") as advance:
        found = evaluation.measure(
            a,
            b,
            text,
            context=context,
            stride=stride,
            windows=windows,
            engine=engine,
            activations=activations,
            activations_a=activations_a,
            activations_b=activations_b,
            kv_a=kv_a,
            kv_b=kv_b,
            adapters_a=adapters_a,
            adapters_b=adapters_b,
            worst=worst,
            threads=threads,
            progress=advance,
        )
    if report is not None:
        write_report(a, {b: found}, text, report)
    if json:
        print_json(found.result)
        return
    _print_figures(found.result)
    _print_documents(found.result)
    _print_worst(found.result)
    if report is not None:
        print(f"\nreport: {report}")


def _print_figures(result: CompareResult) -> None:
    rows = [
        ("perplexity of A", f"{result.perplexity_a:.4f}", f"{result.perplexity_a_stderr:.4f}"),
        ("perplexity of B", f"{result.perplexity_b:.4f}", f"{result.perplexity_b_stderr:.4f}"),
        ("perplexity B / A (paired)", f"{result.perplexity_ratio:.6f}", f"{result.perplexity_ratio_stderr:.6f}"),
        ("ln(perplexity B / A) (paired)", f"{result.ln_ratio:.6f}", f"{result.ln_ratio_stderr:.6f}"),
        ("KL divergence, mean", f"{result.kld_mean:.6f}", f"{result.kld_stderr:.6f}"),
        ("KL divergence, median", f"{result.kld_median:.6f}", ""),
        ("KL divergence, 90th percentile", f"{result.kld_p90:.6f}", ""),
        ("KL divergence, 95th percentile", f"{result.kld_p95:.6f}", ""),
        ("KL divergence, 99th percentile", f"{result.kld_p99:.6f}", ""),
        ("KL divergence, 99.9th percentile", f"{result.kld_p999:.6f}", ""),
        ("KL divergence, largest", f"{result.kld_max:.6f}", ""),
        ("same top token", f"{100 * result.same_top:.3f} %", f"{100 * result.same_top_stderr:.3f} %"),
        ("p of the true token, RMS change", f"{100 * result.rms_dp:.3f} %", f"{100 * result.rms_dp_stderr:.3f} %"),
        ("p of the true token, mean change", f"{100 * result.mean_dp:+.3f} %",
         f"{100 * result.mean_dp_stderr:.3f} %"),
    ]  # fmt: skip
    print_table(("A is the reference; nats per token", "", "standard error"), rows)
    sides = [
        f"{name}: {engine} engine, {activations} activations, {kv} cache"
        for name, engine, activations, kv in (
            ("A", result.engine_a, result.activations_a, result.kv_a),
            ("B", result.engine_b, result.activations_b, result.kv_b),
        )
    ]
    print(f"{result.tokens} tokens in {result.windows} windows of up to {result.context}; {'; '.join(sides)}")


def _print_documents(result: CompareResult) -> None:
    if len(result.documents) < 2:
        return
    print()
    rows = [
        (f"{document.document} {one_line(document.begins)}", str(document.tokens), f"{document.perplexity_a:.3f}",
         f"{document.perplexity_b:.3f}", f"{document.kld_mean:.6f}", f"{100 * document.same_top:.2f} %")
        for document in result.documents[:MOST_DOCUMENTS]
    ]  # fmt: skip
    print_table(("document", "tokens", "perplexity A", "B", "KL divergence", "same top"), rows)
    if len(result.documents) > MOST_DOCUMENTS:
        print(f"and {len(result.documents) - MOST_DOCUMENTS} more (--json lists all)")


def _print_worst(result: CompareResult) -> None:
    if not result.worst:
        return
    print("\nlargest divergences, in context")
    for token in result.worst:
        before = " ".join(token.before.split())[-60:]
        print(one_line(f"  {token.kld:.4f}  {before}[{token.token}]{token.after[:24]}"))
        probabilities = f"p of the true token {token.p_a:.4f} -> {token.p_b:.4f}"
        tops = f"first {token.top_a!r}" if token.top_a == token.top_b else f"first {token.top_a!r} -> {token.top_b!r}"
        print(f"          document {token.document}, token {token.position}: {probabilities}; {tops}")
