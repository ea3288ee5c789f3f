"""transformers' Trainer as pretraining uses it: batches in the sampler's order, Muon or AdamW, one or two stages."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from quantlab.training.failures import TrainingFailedError
from quantlab.training.muon import Muon
from quantlab.training.pretraining_data import Batches, Streams, evaluation_set
from quantlab.training.recipe_file import Schedule
from quantlab.training.two_stages import rate_share, second_stage

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[int, int, str], None]  # (tokens done, tokens in all, the latest losses)


def pretraining_trainer(
    model: PreTrainedModel, schedule: Schedule, streams: Streams, work: Path, progress: Progress | None
) -> Trainer:
    """A trainer whose checkpoints go to a folder in `work`."""
    arguments = TrainingArguments(
        output_dir=str(work / "checkpoints"),
        max_steps=schedule.steps,
        per_device_train_batch_size=1,  # one item is one micro-batch
        gradient_accumulation_steps=schedule.batch_tokens // schedule.micro_batch_tokens,
        per_device_eval_batch_size=1,
        learning_rate=schedule.learning_rate,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": schedule.decay_steps, "decay_type": "linear"},
        warmup_steps=schedule.warmup_steps,
        weight_decay=schedule.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=schedule.gradient_clip,
        bf16=schedule.bf16,  # autocast; the weights and the optimizer's moments stay fp32
        train_sampling_strategy="sequential",  # the order is the sampler's, so that resuming cannot change it
        eval_strategy="steps",
        eval_steps=schedule.evaluate_every,
        save_steps=schedule.save_every,
        save_total_limit=2,
        logging_steps=10,
        logging_nan_inf_filter=False,
        seed=schedule.seed,
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=torch.accelerator.is_available(),
    )

    trainer = (_TwoStageTrainer if schedule.stages == 2 else _PretrainingTrainer)(
        model=model,
        args=arguments,
        train_dataset=Batches(streams.train, schedule),
        eval_dataset=evaluation_set(streams.validation, schedule),
        data_collator=_as_model_input,
        optimizers=(muon(model, schedule) if schedule.optimizer == "muon" else None, None),
        callbacks=[_Report(schedule, progress)],
    )
    trainer.remove_callback(PrinterCallback)  # it prints to stdout
    if schedule.stages == 2:
        trainer.add_callback(_NoDecayInTheEnd())
    return trainer


class _PretrainingTrainer(Trainer):
    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        for name, parameter in self.model.named_parameters():  # a checkpoint of NaN would push out a good one
            if not torch.isfinite(parameter).all():
                raise TrainingFailedError(f"{name} holds NaN or infinity")
        super()._save_checkpoint(model, trial)


class _TwoStageTrainer(_PretrainingTrainer):
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        if self.lr_scheduler is None:
            warmup = self.args.get_warmup_steps(num_training_steps)
            share = partial(rate_share, steps=num_training_steps, warmup=warmup)
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, share)
        return self.lr_scheduler


class _NoDecayInTheEnd(TrainerCallback):
    """No weight decay in the second stage."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= second_stage(state.max_steps):
            for group in kwargs["optimizer"].param_groups:
                group["weight_decay"] = 0.0


class _Report(TrainerCallback):
    """Steps count as tokens, the unit people compare; the losses are the latest logged ones."""

    def __init__(self, schedule: Schedule, progress: Progress | None) -> None:
        self._step_tokens, self._progress, self._note = schedule.batch_tokens, progress, ""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not math.isfinite((logs or {}).get("loss", 0.0)):
            raise TrainingFailedError("the loss is no number any more")
        words = {"loss": "loss", "eval_loss": "held out"}
        self._note = ", ".join(f"{words[key]} {logs[key]:.3f}" for key in words if key in (logs or {})) or self._note

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._progress is not None:
            done, total = state.global_step * self._step_tokens, state.max_steps * self._step_tokens
            self._progress(done, total, self._note)


def _as_model_input(items: list[np.ndarray]) -> dict[str, torch.Tensor]:
    ids = torch.from_numpy(np.concatenate(items))
    return {"input_ids": ids, "labels": ids}


def muon(model: PreTrainedModel, schedule: Schedule) -> Muon:
    """Hidden matrices by Muon; embeddings (GPT-2's positions too), head and vectors by AdamW."""
    tables = [m for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    apart = {id(m.weight) for m in (*tables, model.get_output_embeddings())}
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.ndim == 2 and id(p) not in apart]
    chosen = {id(p) for p in matrices}
    others = [p for p in parameters if id(p) not in chosen]
    return Muon(matrices, others, lr=schedule.learning_rate, weight_decay=schedule.weight_decay)
