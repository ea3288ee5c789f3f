"""`quantlab qat MODEL DATA OUT`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from quantlab.cli import training_options as shared
from quantlab.cli.console import Progress, check_threads, human_bytes, print_notes
from quantlab.cli.options import Config, Json, Model, Threads
from quantlab.cli.training_run import run_training

if TYPE_CHECKING:
    from quantlab.training.qat import QatResult


def qat(
    model: Model,
    data: shared.Data,
    out: Annotated[
        Path, typer.Argument(help="Folder or .gguf file to make; OUT.training holds work at hand.", show_default=False)
    ],
    format: Annotated[
        str | None,
        typer.Option("--format", "-f", help="q4_1, q4_0, q5_0, q5_1, q8_0 or ternary.", show_default="q4_1"),
    ] = None,
    uniform: Annotated[bool, typer.Option("--uniform", help="Embedding and head in --format, not q8_0.")] = False,
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="Preset or YAML file, instead of --format.", show_default=False)
    ] = None,
    levels: Annotated[int | None, typer.Option("--levels", help="Use so many codes (a stress test).")] = None,
    train: Annotated[
        str, typer.Option("--train", help="full, or lora (both through the quantizer); scales; minimums.")
    ] = "full",
    method: Annotated[
        str, typer.Option("--method", help="Of first codes with --train scales: rtn, search, gptq or learned.")
    ] = "rtn",
    teacher: Annotated[
        str | None, typer.Option("--teacher", help="Model whose predictions are the aim.", show_default=False)
    ] = None,
    temperature: Annotated[float, typer.Option("--temperature", help="Of the divergence from the teacher.")] = 1.0,
    float_steps: Annotated[int, typer.Option("--float-steps", help="Steps before rounding is switched on.")] = 0,
    rank: Annotated[int, typer.Option("--rank", "-r", help="Of --train lora.")] = 8,
    alpha: Annotated[float, typer.Option("--alpha", help="A LoRA is scaled by alpha / rank.")] = 16.0,
    targets: Annotated[
        str, typer.Option("--targets", help="Of a LoRA: attention, mlp, all-linear, or layers' names, with commas.")
    ] = "attention",
    rslora: shared.RsLora = False,
    context: shared.SampleTokens = 512,
    packing: shared.Packing = False,
    batch_size: shared.BatchSize = 4,
    accumulation: shared.Accumulation = 1,
    epochs: shared.Epochs = 1.0,
    max_steps: shared.MaxSteps = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            "--learning-rate",
            "--lr",
            help="At its highest; of scales in shares of d.",
            show_default="full: 1e-5, ternary 1e-4; lora: 2e-4; scales: 5e-3",
        ),
    ] = None,
    scheduler: shared.Scheduler = "cosine",
    warmup: shared.Warmup = 0.03,
    weight_decay: shared.WeightDecay = 0.0,
    gradient_clip: shared.GradientClip = 1.0,
    gradient_checkpointing: shared.GradientCheckpointing = None,
    activations: Annotated[
        str,
        typer.Option("--activations", help="int8, as generation has them (CPU), float, or auto."),
    ] = "auto",
    dtype: Annotated[str, typer.Option("--dtype", help="Of activations: float32 or bfloat16.")] = "float32",
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
    resume: shared.Resume = False,
    overwrite: shared.Overwrite = False,
    seed: Annotated[int, typer.Option("--seed", help="Of factors and order.")] = 0,
    threads: Threads = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Train a model for the blocks it is stored in: what training computes with is what is written."""
    options = locals()
    check_threads(threads)
    from quantlab.training.qat_settings import QatSettings

    settings = shared.settings_from(QatSettings, options)
    # `levels` and `method` mean something else to the trainer, which fine-tuning's are
    training = shared.training_settings(options, levels=None, method="lora")
    rows, chat_template = shared.row_settings(options), shared.own_template(template)

    def run(report: Progress) -> QatResult:
        from quantlab.training.qat import qat

        return qat(
            model, data, out, settings=settings, training=training, data_settings=rows, teacher=teacher,
            template=chat_template, end_token=end_token, device=device, resume=resume, overwrite=overwrite,
            progress=report,
        )  # fmt: skip

    run_training(out, threads, json, run, _print_result)


def _print_result(result: QatResult) -> None:
    print(
        f"{result.train}: {result.trainable_parameters / 1e3:.1f} k numbers trained "
        f"({result.parameters / 1e6:.1f} M parameters)\n"
        f"{result.steps} steps, {result.training_tokens / 1e3:.1f} k tokens at {result.tokens_per_second:.0f}/s, "
        f"{human_bytes(result.peak_rss_bytes)} at the peak\n"
        f"loss {result.train_loss:.4f} in training"
    )
    if result.test_loss is not None:
        print(f"test: {result.test_loss:.4f} nats per labelled token")
    if result.eval_loss is not None:
        print(f"held out: {result.eval_loss_before:.4f} -> {result.eval_loss:.4f} nats per labelled token")
    if result.kld_after is not None:
        print(f"divergence from the reference: {result.kld_before:.5f} -> {result.kld_after:.5f} nats a token")
    print_notes(result.notes)
    print(f"written: {result.out}, {human_bytes(result.bytes)}")
