"""The table of commands. Each lives in a module of its name, whose heavy imports wait until it runs."""

from __future__ import annotations

import typer
from quantlab.cli import (
    bench,
    chat,
    compare,
    evaluate,
    evolve,
    export,
    extract_adapter,
    finetune,
    fuse,
    generate,
    index,
    inspect,
    merge,
    perplexity,
    pretrain,
    qat,
    quantize,
    report,
    search,
    serve,
    verify,
)

# The parser's error class; typer does not export it, but a bad parameter is one.
UsageError: type[typer.BadParameter] = typer.BadParameter.__mro__[1]
INTERRUPTED = 130  # typer's status after Ctrl-C; older versions abort instead

app = typer.Typer(
    name="quantlab",
    help="Compress, adapt, merge and run GPT-style language models on the machine you have.",
    no_args_is_help=False,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for command in (quantize.quantize, export.export, inspect.inspect, verify.verify, generate.generate, chat.chat,
                perplexity.perplexity, compare.compare, report.report, evaluate.evaluate, bench.bench,
                finetune.finetune, fuse.fuse, extract_adapter.extract_adapter, merge.merge, evolve.evolve,
                qat.qat, pretrain.pretrain, index.index, search.search, serve.serve):  # fmt: skip
    app.command(no_args_is_help=False)(command)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", help="Print the version and leave."),
) -> None:
    """Compress, adapt, merge and run GPT-style language models on the machine you have."""
    if version:
        from importlib.metadata import version as installed

        print(f"quantlab {installed('quantlab')}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


def run() -> int:
    """Parse the command line and run the command; the exit status.

    Raises:
        InputError: the command line is wrong.
        KeyboardInterrupt: Ctrl-C.
    """
    from quantlab.errors import InputError

    try:
        status = app(standalone_mode=False, prog_name="quantlab")
    except UsageError as error:
        command = error.ctx.command_path if error.ctx is not None else "quantlab"
        raise InputError(f"{error.format_message()} (see: {command} --help)") from None
    except typer.Abort:
        raise KeyboardInterrupt from None
    if status == INTERRUPTED:
        raise KeyboardInterrupt
    return status if isinstance(status, int) else 0
