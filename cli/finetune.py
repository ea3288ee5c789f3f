"""`quantlab finetune MODEL DATA OUT`."""

from __future__ import annotations

import logging
import sys
from json import loads
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
from quantlab.cli.options import Config, Json, Model, PromptLayout, Threads

if TYPE_CHECKING:
    from quantlab.training.finetune import FinetuneResult
    from quantlab.training.prepared import DataSettings


def finetune(
    model: Model,
    data: Annotated[
        Path, typer.Argument(help="jsonl or txt file, or folder with train, valid and test.", show_default=False)
    ],
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
    rslora: Annotated[bool, typer.Option("--rslora", help="Scale by alpha / sqrt(rank).")] = False,
    dora: Annotated[bool, typer.Option("--dora", help="Weight-decomposed LoRA (float models).")] = False,
    context: Annotated[int, typer.Option("--context", help="Most tokens of a sample.")] = 512,
    packing: Annotated[bool, typer.Option("--packing", help="Fill windows with several whole samples.")] = False,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", help="Samples of a forward pass.")] = 4,
    accumulation: Annotated[int, typer.Option("--accumulation", help="Forward passes of a step.")] = 1,
    epochs: Annotated[float, typer.Option("--epochs", help="Passes over the data.")] = 1.0,
    max_steps: Annotated[int | None, typer.Option("--max-steps", help="Instead of epochs.", show_default=False)] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", "--lr", help="At its highest.", show_default="2e-4; full: 2e-5")
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
        str, typer.Option("--activations", help="Of packed layers: int8, as generation has them, float, or auto.")
    ] = "auto",
    dtype: Annotated[str, typer.Option("--dtype", help="float32 or bfloat16.")] = "float32",
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
    prompt_layout: PromptLayout = None,
    train_prompts: Annotated[bool, typer.Option("--train-prompts", help="Loss on prompts, too.")] = False,
    last_turn_only: Annotated[bool, typer.Option("--last-turn-only", help="Learn the last answer of a chat.")] = False,
    too_long: Annotated[str, typer.Option("--too-long", help="Rows beyond the context: error, cut or skip.")] = "error",
    template: Annotated[
        Path | None, typer.Option("--chat-template", help="File, instead of the model's own.", show_default=False)
    ] = None,
    end_token: Annotated[
        str | None, typer.Option("--end-token", help="Ends texts, instead of the tokenizer's own, as '<|im_end|>'.")
    ] = None,
    show_batch: Annotated[
        bool, typer.Option("--show-batch", help="Print a batch, and which tokens are learnt.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what OUT.training holds.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of factors, order and dropout.")] = 0,
    threads: Threads = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Fine-tune a model: a LoRA on a float or quantized one, or all weights of a float one."""
    check_threads(threads)
    from quantlab.checkpoint.chat_text import read_template
    from quantlab.errors import one_line
    from quantlab.training.finetune_settings import FinetuneSettings
    from quantlab.training.prepared import DataSettings

    settings = FinetuneSettings(
        method=method, merge_aware=merge_aware, regrid=regrid, levels=levels, rank=rank, alpha=alpha, dropout=dropout,
        targets=targets, rslora=rslora, dora=dora, context=context, packing=packing, batch_size=batch_size,
        accumulation=accumulation, epochs=epochs, max_steps=max_steps, learning_rate=learning_rate,
        scheduler=scheduler, warmup=warmup, weight_decay=weight_decay, gradient_clip=gradient_clip,
        gradient_checkpointing=gradient_checkpointing, activations=activations, dtype=dtype, eval_every=eval_every,
        early_stopping=early_stopping, logger=report_to, seed=seed,
    )  # fmt: skip
    rows = DataSettings(
        context=context, held_out=eval_split, seed=seed, prompt_field=prompt_field,
        completion_field=completion_field, prompt_layout=prompt_layout, completion_only=not train_prompts,
        last_turn_only=last_turn_only, too_long=too_long,
    )  # fmt: skip
    own_template = None if template is None else read_template(template)
    if show_batch:
        _show_batch(model, data, rows, own_template, end_token, batch_size, json)
        return
    use_threads(threads)
    quiet_transformers()
    from quantlab.training import finetune as training
    from quantlab.training.failures import TrainingFailedError
    from quantlab.training.surroundings import is_first_process

    try:
        with progress("training", "tokens") as report:
            result = training.finetune(
                model, data, out, settings=settings, data_settings=rows, template=own_template,
                end_token=end_token, device=device, resume=resume, overwrite=overwrite, progress=report,
            )  # fmt: skip
    except (KeyboardInterrupt, SystemExit):
        say_how_to_resume(out)
        raise
    except TrainingFailedError as error:
        print(f"quantlab: {one_line(str(error))}", file=sys.stderr)
        raise typer.Exit(1) from None
    if not is_first_process():  # of several, one speaks
        return
    draw_loss(out, result.training_tokens // max(1, result.steps))
    if json:
        print_json(result)
    else:
        _print_result(result)


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


def say_how_to_resume(out: Path) -> None:
    """On stderr, if an interrupted run left something to go on with."""
    folder = out.with_name(out.name + ".training")
    if folder.is_dir():  # it is gone where no checkpoint was complete
        print(
            f"note: checkpoints are kept in {folder}: the same command with --resume goes on from there",
            file=sys.stderr,
        )


def draw_loss(out: Path, tokens_per_step: int) -> None:
    """Put loss.png beside the adapter, if matplotlib is there; the figures are in training_log.json either way."""
    from quantlab.errors import InputError
    from quantlab.evaluation.plots import loss_curve

    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells of its caches
    try:
        log = loads((out / "training_log.json").read_text(encoding="utf-8"))["log"]
        loss_curve(log, out / "loss.png", tokens_per_step)
    except (InputError, OSError) as error:  # the result is complete without it
        print(f"note: no loss.png: {error}", file=sys.stderr)


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
