"""`quantlab qat MODEL DATA OUT`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from quantlab.cli.console import (
    check_threads,
    human_bytes,
    print_json,
    print_notes,
    progress,
    quiet_transformers,
    use_threads,
)
from quantlab.cli.options import Config, Json, Model, Threads

if TYPE_CHECKING:
    from quantlab.training.qat import QatResult


def qat(
    model: Model,
    data: Annotated[
        Path, typer.Argument(help="jsonl or txt file, or folder with train, valid and test.", show_default=False)
    ],
    out: Annotated[
        Path, typer.Argument(help="Folder or .gguf file to make; OUT.training holds work at hand.", show_default=False)
    ],
    format: Annotated[
        str | None, typer.Option("--format", "-f", help="q4_1, q4_0, q5_0, q5_1 or q8_0.", show_default="q4_1")
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
    rslora: Annotated[bool, typer.Option("--rslora", help="Scale by alpha / sqrt(rank).")] = False,
    context: Annotated[int, typer.Option("--context", help="Most tokens of a sample.")] = 512,
    packing: Annotated[bool, typer.Option("--packing", help="Fill windows with several whole samples.")] = False,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", help="Samples of a forward pass.")] = 4,
    accumulation: Annotated[int, typer.Option("--accumulation", help="Forward passes of a step.")] = 1,
    epochs: Annotated[float, typer.Option("--epochs", help="Passes over the data.")] = 1.0,
    max_steps: Annotated[int | None, typer.Option("--max-steps", help="Instead of epochs.", show_default=False)] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            "--learning-rate",
            "--lr",
            help="At its highest; of scales in shares of d.",
            show_default="full: 1e-5; lora: 2e-4; scales: 5e-3",
        ),
    ] = None,
    scheduler: Annotated[
        str, typer.Option("--scheduler", help="cosine, linear, constant or constant_with_warmup.")
    ] = "cosine",
    warmup: Annotated[float, typer.Option("--warmup", help="Share of the steps in which the rate grows.")] = 0.03,
    weight_decay: Annotated[float, typer.Option("--weight-decay", help="AdamW's.")] = 0.0,
    gradient_clip: Annotated[float, typer.Option("--gradient-clip", help="The gradient's greatest norm.")] = 1.0,
    gradient_checkpointing: Annotated[
        bool | None,
        typer.Option(
            "--gradient-checkpointing/--no-gradient-checkpointing",
            help="Save memory by computing layers twice.",
            show_default="from 100 M parameters on",
        ),
    ] = None,
    activations: Annotated[
        str, typer.Option("--activations", help="int8, as generation has them (CPU), float, or auto.")
    ] = "auto",
    dtype: Annotated[str, typer.Option("--dtype", help="Of activations: float32 or bfloat16.")] = "float32",
    device: Annotated[str, typer.Option("--device", help="auto, cpu, or an accelerator such as cuda.")] = "auto",
    eval_split: Annotated[
        float | None,
        typer.Option(
            "--eval-split",
            help="Rows to hold out: a share, or a number.",
            show_default="0.05, if there is no valid file",
        ),
    ] = None,
    eval_every: Annotated[
        int | None, typer.Option("--eval-every", help="Steps between evaluations and checkpoints.", show_default="1/10")
    ] = None,
    early_stopping: Annotated[
        int | None, typer.Option("--early-stopping", help="Stop after so many evaluations without gain; keep the best.")
    ] = None,
    report_to: Annotated[str, typer.Option("--report-to", help="none, tensorboard or wandb.")] = "none",
    prompt_field: Annotated[str | None, typer.Option("--prompt-field", help="Rows' field for the prompt.")] = None,
    completion_field: Annotated[str | None, typer.Option("--completion-field", help="... for the completion.")] = None,
    prompt_layout: Annotated[
        str | None, typer.Option("--prompt-layout", help="Text around it, such as 'Question: {prompt}\\nAnswer:'.")
    ] = None,
    train_prompts: Annotated[bool, typer.Option("--train-prompts", help="Loss on prompts, too.")] = False,
    last_turn_only: Annotated[bool, typer.Option("--last-turn-only", help="Learn the last answer of a chat.")] = False,
    too_long: Annotated[str, typer.Option("--too-long", help="Rows beyond the context: error, cut or skip.")] = "error",
    template: Annotated[
        Path | None, typer.Option("--chat-template", help="File, instead of the model's own.", show_default=False)
    ] = None,
    end_token: Annotated[
        str | None, typer.Option("--end-token", help="Ends texts, instead of the tokenizer's own, as '<|im_end|>'.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what OUT.training holds.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of factors and order.")] = 0,
    threads: Threads = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Train a model for the blocks it is stored in: what training computes with is what is written."""
    check_threads(threads)
    from quantlab.checkpoint.chat_text import read_template
    from quantlab.errors import one_line
    from quantlab.training.finetune_settings import FinetuneSettings
    from quantlab.training.prepared import DataSettings
    from quantlab.training.qat_settings import QatSettings

    settings = QatSettings(
        format=format, uniform=uniform, recipe=recipe, levels=levels, train=train, method=method,
        temperature=temperature, float_steps=float_steps,
    )  # fmt: skip
    training = FinetuneSettings(
        rank=rank, alpha=alpha, targets=targets, rslora=rslora, context=context, packing=packing,
        batch_size=batch_size, accumulation=accumulation, epochs=epochs, max_steps=max_steps,
        learning_rate=learning_rate, scheduler=scheduler, warmup=warmup, weight_decay=weight_decay,
        gradient_clip=gradient_clip, gradient_checkpointing=gradient_checkpointing, activations=activations,
        dtype=dtype, eval_every=eval_every, early_stopping=early_stopping, logger=report_to, seed=seed,
    )  # fmt: skip
    rows = DataSettings(
        context=context, held_out=eval_split, seed=seed, prompt_field=prompt_field,
        completion_field=completion_field, prompt_layout=prompt_layout, completion_only=not train_prompts,
        last_turn_only=last_turn_only, too_long=too_long,
    )  # fmt: skip
    own_template = None if template is None else read_template(template)
    use_threads(threads)
    quiet_transformers()
    from quantlab.cli.finetune import draw_loss, say_how_to_resume

    from quantlab.training import qat as run
    from quantlab.training.failures import TrainingFailedError
    from quantlab.training.surroundings import is_first_process

    try:
        with progress("training", "tokens") as report:
            result = run.qat(
                model, data, out, settings=settings, training=training, data_settings=rows, teacher=teacher,
                template=own_template, end_token=end_token, device=device, resume=resume, overwrite=overwrite,
                progress=report,
            )  # fmt: skip
    except (KeyboardInterrupt, SystemExit):
        say_how_to_resume(out)
        raise
    except TrainingFailedError as error:
        print(f"quantlab: {one_line(str(error))}", file=sys.stderr)
        raise typer.Exit(1) from None
    if not is_first_process():  # of several, one speaks
        return
    if out.is_dir():
        draw_loss(out, result.training_tokens // max(1, result.steps))
    if json:
        print_json(result)
    else:
        _print_result(result)


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
