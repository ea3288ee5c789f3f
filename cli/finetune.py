"""`quantlab finetune MODEL DATA OUT`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from quantlab.cli import training_options as shared
from quantlab.cli.console import Progress, check_threads, human_bytes, print_json, print_notes
from quantlab.cli.options import Config, Json, Model, Threads
from quantlab.cli.training_run import run_training

if TYPE_CHECKING:
    from quantlab.training.finetune import FinetuneResult
    from quantlab.training.prepared import DataSettings


def finetune(
    model: Model,
    data: shared.Data,
    out: Annotated[Path, typer.Argument(help="Folder to make; OUT.training holds work at hand.", show_default=False)],
    method: Annotated[
        str, typer.Option("--method", help="lora; block-sum, which fuses into q4_1 and q5_1 exactly; full.")
    ] = "lora",
    merge_aware: Annotated[
        bool, typer.Option("--merge-aware", help="Train the LoRA through the blocks that fuse will write.")
    ] = False,
    regrid: Annotated[bool, typer.Option("--regrid", help="Of --merge-aware: choose scales anew too.")] = False,
    levels: Annotated[
        int | None, typer.Option("--levels", help="Of --merge-aware: use so many codes (a stress test).")
    ] = None,
    rank: Annotated[int, typer.Option("--rank", "-r", help="Of the update.")] = 8,
    alpha: Annotated[float, typer.Option("--alpha", help="The update is scaled by alpha / rank.")] = 16.0,
    dropout: Annotated[float, typer.Option("--dropout", help="Of the adapter's inputs.")] = 0.0,
    targets: Annotated[
        str, typer.Option("--targets", help="attention, mlp, all-linear, or layers' names, with commas.")
    ] = "attention",
    rslora: shared.RsLora = False,
    dora: Annotated[bool, typer.Option("--dora", help="Weight-decomposed LoRA (float models).")] = False,
    context: shared.SampleTokens = 512,
    packing: shared.Packing = False,
    batch_size: shared.BatchSize = 4,
    accumulation: shared.Accumulation = 1,
    epochs: shared.Epochs = 1.0,
    max_steps: shared.MaxSteps = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", "--lr", help="At its highest.", show_default="2e-4; full: 2e-5")
    ] = None,
    scheduler: shared.Scheduler = "cosine",
    warmup: shared.Warmup = 0.03,
    weight_decay: shared.WeightDecay = 0.0,
    gradient_clip: shared.GradientClip = 1.0,
    gradient_checkpointing: shared.GradientCheckpointing = None,
    activations: Annotated[
        str, typer.Option("--activations", help="Of packed layers: int8, as generation has them, float, or auto.")
    ] = "auto",
    dtype: Annotated[str, typer.Option("--dtype", help="float32 or bfloat16.")] = "float32",
    device: shared.Device = "auto",
    eval_split: shared.EvalSplit = None,
    eval_every: shared.EvalEvery = None,
    early_stopping: shared.EarlyStopping = None,
    report_to: shared.ReportTo = "none",
    prompt_field: shared.PromptField = None,
    completion_field: shared.CompletionField = None,
    prompt_layout: shared.PromptLayout = None,
    train_prompts: shared.TrainPrompts = False,
    last_turn_only: shared.LastTurnOnly = False,
    too_long: shared.TooLong = "error",
    template: shared.Template = None,
    end_token: shared.EndToken = None,
    show_batch: Annotated[
        bool, typer.Option("--show-batch", help="Print a batch, and which tokens are learnt.")
    ] = False,
    resume: shared.Resume = False,
    overwrite: shared.Overwrite = False,
    seed: Annotated[int, typer.Option("--seed", help="Of factors, order and dropout.")] = 0,
    threads: Threads = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Fine-tune a model: a LoRA on a float or quantized one, or all weights of a float one."""
    options = locals()
    check_threads(threads)
    settings, rows = shared.training_settings(options), shared.row_settings(options)
    chat_template = shared.own_template(template)
    if show_batch:
        _show_batch(model, data, rows, chat_template, end_token, batch_size, json)
        return

    def train(report: Progress) -> FinetuneResult:
        from quantlab.training.finetune import finetune

        return finetune(
            model, data, out, settings=settings, data_settings=rows, template=chat_template, end_token=end_token,
            device=device, resume=resume, overwrite=overwrite, progress=report,
        )  # fmt: skip

    run_training(out, threads, json, train, _print_result)


def _show_batch(
    model: str, data: Path, rows: DataSettings, template: str | None, end_token: str | None, count: int, json: bool
) -> None:
    from quantlab.cli.batch_view import batch_view, show_batch

    from quantlab.checkpoint import load_tokenizer
    from quantlab.checkpoint.chat_text import chat_template
    from quantlab.training.prepared import prepare_data
    from quantlab.training.text_labels import with_end_token

    tokenizer = load_tokenizer(model)
    if end_token is not None:
        tokenizer = with_end_token(tokenizer, end_token)
    prepared = prepare_data(data, tokenizer, chat_template(model) if template is None else template, rows)
    view = batch_view(prepared.train, tokenizer, count, prepared.notes)
    if json:
        print_json(view)
        return
    show_batch(view.samples, view.totals)
    print_notes(prepared.notes)


def _print_result(result: FinetuneResult) -> None:
    share = 100 * result.trainable_parameters / result.parameters
    held_out = ""
    if result.eval_loss is not None:
        held_out = f", held out {result.eval_loss_before:.4f} -> {result.eval_loss:.4f} nats per labelled token"
    if result.test_loss is not None:
        held_out += f"; test {result.test_loss:.4f}"
    print(
        f"{result.method}: {result.trainable_parameters / 1e3:.1f} k of {result.parameters / 1e6:.1f} M parameters "
        f"trained ({share:.2f} %)\n"
        f"{result.steps} steps, {result.training_tokens / 1e3:.1f} k tokens at {result.tokens_per_second:.0f}/s, "
        f"{human_bytes(result.peak_rss_bytes)} at the peak\n"
        f"loss {result.train_loss:.4f} in training{held_out}"
    )
    print_notes(result.notes)
    print(f"written: {result.adapter}")
