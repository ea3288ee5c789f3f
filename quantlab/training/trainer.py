"""transformers' Trainer as fine-tuning uses it: our loss, token-weighted evaluation, marked checkpoints."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from quantlab.training.batches import Collator, SampleSet
from quantlab.training.checkpoints import mark_complete, remove_older
from quantlab.training.failures import TrainingFailedError
from quantlab.training.finetune_settings import FinetuneSettings
from quantlab.training.sample import NO_LOSS

Progress = Callable[[int, int, str], None]  # (tokens done, tokens in all, step and losses)

EVALUATIONS = 10  # in a run, unless told otherwise
KEPT_CHECKPOINTS = 2


class NextTokenTrainer(Trainer):
    """The model's forward pass returns the sum of losses (`next_token_loss.computes_loss`).

    A step's loss is the mean over its labelled tokens, in all micro-batches and processes together, and so is an
    evaluation's: transformers averages means of batches.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # count a step's labelled tokens for compute_loss
        self._evaluated = torch.zeros(2, dtype=torch.float64)  # sum of losses, labelled tokens

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> TrainOutput:
        """transformers' own, but a run whose checkpoint was its end is only loaded: that would take one step more."""
        state = None if resume_from_checkpoint is None else _ended(Path(resume_from_checkpoint))
        if state is None:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        started, self.state = time.monotonic(), state
        best = state.best_model_checkpoint if self.args.load_best_model_at_end else None
        self._load_from_checkpoint(best or resume_from_checkpoint)
        loss = next((entry["loss"] for entry in reversed(state.log_history) if "loss" in entry), math.nan)
        metrics = {"train_runtime": time.monotonic() - started, "train_loss": loss}
        return TrainOutput(state.global_step, loss, metrics)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        total = model(**inputs)
        count = (inputs["labels"][:, 1:] != NO_LOSS).sum()
        if not self.model.training:
            self._evaluated += torch.stack((total.detach(), count)).to("cpu", torch.float64)
        if num_items_in_batch is not None:
            count = torch.as_tensor(num_items_in_batch, device=total.device) / self.accelerator.num_processes
        loss = total / count.clamp(min=1)
        if not math.isfinite(loss.item()):
            raise TrainingFailedError(f"the loss of step {self.state.global_step + 1} is {loss.item()}")
        return (loss, {}) if return_outputs else loss

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor, None, None]:
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        self._evaluated.zero_()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        total, count = self.accelerator.reduce(self._evaluated.clone().to(self.args.device).float(), "sum").tolist()
        if output.metrics is not None and count:
            output.metrics[f"{metric_key_prefix}_loss"] = total / count
        return output

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._check_weights()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial))
            mark_complete(folder / f"checkpoint-{self.state.global_step}")
            remove_older(folder, KEPT_CHECKPOINTS, self.state.best_model_checkpoint)

    def _check_weights(self) -> None:
        """A checkpoint of NaN would push out a good one."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and not torch.isfinite(parameter).all():
                raise TrainingFailedError(f"after step {self.state.global_step} {name} holds NaN or infinity")


def _ended(checkpoint: Path) -> TrainerState | None:
    """The state of a run that was over when `checkpoint` was saved, by its number of steps or by early stopping."""
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    control = state.stateful_callbacks.get("TrainerControl", {}).get("args", {})
    return state if state.global_step >= state.max_steps or control.get("should_training_stop") else None


def make_trainer(
    model: Any,
    settings: FinetuneSettings,
    train: SampleSet,
    held_out: SampleSet | None,
    folder: Path,
    *,
    on_cpu: bool,
    pad: int,
    gradient_checkpointing: bool,
    evaluate_first: bool,
    progress: Progress | None,
    kind: type[NextTokenTrainer] = NextTokenTrainer,
    autocast: bool = False,
) -> NextTokenTrainer:
    """A trainer, of that `kind`, whose checkpoints go to `folder`; with `autocast` products are in bfloat16."""
    steps = planned_steps(settings, len(train))
    every = settings.eval_every or max(1, math.ceil(steps / EVALUATIONS))
    evaluates = held_out is not None
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.rate,
        lr_scheduler_type=settings.scheduler,
        warmup_steps=math.ceil(settings.warmup * steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.gradient_clip,
        gradient_checkpointing=gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        bf16=autocast,  # else the model is in the dtype that was asked for, and the factors in fp32
        eval_strategy="steps" if evaluates else "no",
        eval_steps=every,
        eval_on_start=evaluates and evaluate_first,  # before train(), it would keep the model from being wrapped
        save_strategy="steps",
        save_steps=every,
        save_total_limit=None,  # older ones are removed once the new one is marked
        load_best_model_at_end=evaluates and settings.early_stopping is not None,
        metric_for_best_model="eval_loss" if evaluates else None,
        greater_is_better=False if evaluates else None,
        logging_steps=max(1, min(10, steps // 20)),
        logging_nan_inf_filter=False,
        prediction_loss_only=True,
        remove_unused_columns=False,
        seed=settings.seed,
        report_to=settings.logger,
        disable_tqdm=True,
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        ddp_find_unused_parameters=False,
    )
    callbacks: list[TrainerCallback] = [_Report(progress, train.tokens / max(1, len(train)), settings)]
    if evaluates and settings.early_stopping is not None:
        callbacks.append(EarlyStoppingCallback(settings.early_stopping))
    trainer = kind(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=Collator(pad),
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)  # it prints to stdout
    return trainer


def planned_steps(settings: FinetuneSettings, items: int) -> int:
    """Optimizer steps of the run; the last batch of an epoch may be smaller."""
    if settings.max_steps is not None:
        return settings.max_steps
    batches = math.ceil(items / (settings.batch_size * processes()))
    return max(1, math.ceil(settings.epochs * math.ceil(batches / settings.accumulation)))


def processes() -> int:
    """How many processes train together, as torchrun and accelerate tell each of them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


class _Report(TrainerCallback):
    """Steps as tokens, the unit people compare, with the latest losses."""

    def __init__(self, progress: Progress | None, item_tokens: float, settings: FinetuneSettings) -> None:
        self._progress = progress
        self._step_tokens = item_tokens * settings.batch_size * settings.accumulation * processes()
        self._losses: dict[str, float] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self._losses |= {key: logs[key] for key in ("loss", "eval_loss") if key in (logs or {})}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._progress is None or not state.is_world_process_zero:
            return
        words = {"loss": "loss", "eval_loss": "held out"}
        losses = [f"{words[key]} {value:.3f}" for key, value in self._losses.items()]
        note = ", ".join([f"step {state.global_step}/{state.max_steps}", *losses])
        done, total = (int(count * self._step_tokens) for count in (state.global_step, state.max_steps))
        self._progress(done, total, note)


def losses_of(history: Sequence[dict[str, Any]], key: str) -> list[float]:
    """One kind of figure from the Trainer's log, in the order of steps."""
    return [entry[key] for entry in history if key in entry]
