"""The frame of a training on a user's rows: its checks, its trainer, its figures; fine-tuning and QAT fill it."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantlab.checkpoint import load_tokenizer, open_checkpoint
from quantlab.checkpoint.chat_text import chat_template
from quantlab.checkpoint.checkpoint import Checkpoint
from quantlab.checkpoint.checksums import model_digest
from quantlab.checkpoint.export import check_beside
from quantlab.errors import InputError
from quantlab.training.checkpoints import newest_complete, step_of
from quantlab.training.finetune_settings import CHECKPOINTING_FROM, FinetuneSettings
from quantlab.training.finetune_work import CHECKPOINTS, check_folders, explained, work_of
from quantlab.training.prepared import DataSettings, PreparedData, prepare_data
from quantlab.training.surroundings import check_packages, chosen_device, refuse_sharding_on_cpu
from quantlab.training.text_labels import with_end_token

if TYPE_CHECKING:
    from quantlab.training.batches import SampleSet
    from quantlab.training.trainer import NextTokenTrainer, Progress

LOG = "training_log.json"


@dataclass(frozen=True)
class Request:
    """What is to be trained on what; see `finetune` for its parts."""

    model: str | Path
    data: Path
    out: Path
    data_settings: DataSettings | None = None
    template: str | None = None
    end_token: str | None = None
    device: str = "auto"
    resume: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class Tuning:
    """A request that passed all checks. `template` is a chat template in place of the model's own, if one was given."""

    source: str | Path
    checkpoint: Checkpoint
    settings: FinetuneSettings
    data: PreparedData
    out: Path
    work: Path
    device: str
    overwrite: bool
    digest: str
    template: str | None

    @property
    def checkpoints(self) -> Path:
        """The trainer's folder."""
        return self.work / CHECKPOINTS

    def samples(self) -> SampleSet:
        """What is trained on."""
        from quantlab.training.batches import packed, unpacked

        return packed(self.data.train, self.settings.context) if self.settings.packing else unpacked(self.data.train)

    def held_out(self) -> SampleSet | None:
        """The rows to evaluate on."""
        from quantlab.training.batches import unpacked

        return unpacked(self.data.valid) if self.data.valid else None

    def identity(self, **more: Any) -> dict[str, Any]:
        """What a resumed run must have in common with the one that began; `more` is the verb's own."""
        import torch

        from quantlab.training.trainer import processes

        return {
            "model": self.digest,
            "data": self.data.digest,
            **more,
            "threads": torch.get_num_threads(),
            "processes": processes(),
            "device": self.device,
        }


def open_model(request: Request, settings: FinetuneSettings) -> Checkpoint:
    """The model to train, once packages and the place of the result are known to do.

    Raises:
        InputError: they do not, or there is no such model.
    """
    check_packages(settings)
    work_of(request.out)
    checkpoint = open_checkpoint(request.model)
    check_beside(checkpoint, request.out)
    return checkpoint


def checked(request: Request, checkpoint: Checkpoint, settings: FinetuneSettings) -> Tuning:
    """The rest of the checks: folders, rows, device; and the rows as samples.

    Raises:
        InputError: samples are longer than the model's positions; the result exists, or unfinished work of it; wrong
            rows; early stopping with nothing held out; no such device.
    """
    _check_context(checkpoint, settings)
    work = work_of(request.out)
    check_folders(request.data, request.out, work, request.resume, request.overwrite)
    data = _prepared_rows(request, settings)
    if settings.early_stopping is not None and not data.valid:
        raise InputError(
            "--early-stopping: no rows are held out to judge by; give --eval-split, or a folder with a valid file"
        )
    device = chosen_device(request.device)
    refuse_sharding_on_cpu(device)
    digest = model_digest(checkpoint)
    return Tuning(
        request.model,
        checkpoint,
        settings,
        data,
        request.out,
        work,
        device,
        request.overwrite,
        digest,
        request.template,
    )


def _check_context(checkpoint: Checkpoint, settings: FinetuneSettings) -> None:
    limit = checkpoint.config.get("max_position_embeddings", checkpoint.config.get("n_positions"))
    if isinstance(limit, int) and settings.context > limit:
        raise InputError(f"--context {settings.context}: the model has {limit} positions")


def _prepared_rows(request: Request, settings: FinetuneSettings) -> PreparedData:
    """With the model's tokenizer, and its chat template and end token or the given ones."""
    chosen = request.data_settings or DataSettings(context=settings.context, held_out=None)
    model, template, tokenizer = request.model, request.template, load_tokenizer(request.model)
    known = tokenizer.eos
    if request.end_token is not None:
        tokenizer = with_end_token(tokenizer, request.end_token)
    prepared = prepare_data(request.data, tokenizer, chat_template(model) if template is None else template, chosen)
    if not tokenizer.eos <= known:
        prepared.notes.append(
            f"texts end with {request.end_token!r} in training, and {model} does not stop there by itself: "
            f"name it as eos_token_id in its generation_config.json, or generate with --stop"
        )
    return prepared


@contextmanager
def explained_failures(work: Path, tidy: Callable[[Path], None]) -> Iterator[None]:
    """Let a training that does not end leave `work` tidy, and say in one line why where that is known.

    Raises:
        TrainingFailedError: the loss became NaN, or memory or the disk is too small.
    """
    try:
        yield
    except BaseException as error:
        failure = explained(error, work) if isinstance(error, Exception) else None
        tidy(work)
        if failure is not None:
            raise failure from None
        raise


@dataclass(frozen=True)
class Trained:
    """Figures of a training as every result has them; losses are nats per labelled token."""

    steps: int
    train_loss: float
    training_tokens: int
    tokens_per_second: float
    seconds: float


def tuning_trainer(
    tuning: Tuning,
    model: Any,  # Any: transformers' model, peft's around it, or a student
    progress: Progress | None,
    kind: type[NextTokenTrainer] | None = None,
    autocast: bool = False,
) -> NextTokenTrainer:
    """The trainer, of that `kind`, with products in bfloat16 by `autocast`; a run that begins is evaluated before its
    first step.
    """
    from quantlab.training.trainer import NextTokenTrainer, make_trainer

    chosen = tuning.settings.gradient_checkpointing
    return make_trainer(
        model,
        tuning.settings,
        tuning.samples(),
        tuning.held_out(),
        tuning.checkpoints,
        on_cpu=tuning.device == "cpu",
        pad=0,  # any id will do: no sample sees the padding, and it carries no loss
        gradient_checkpointing=tuning.checkpoint.parameters >= CHECKPOINTING_FROM if chosen is None else chosen,
        evaluate_first=newest_complete(tuning.checkpoints) is None,
        progress=progress,
        kind=kind or NextTokenTrainer,
        autocast=autocast,
    )


def train_to_the_end(tuning: Tuning, trainer: NextTokenTrainer) -> Trained:
    """Train, from the newest complete checkpoint on where there is one."""
    from quantlab.training.trainer import losses_of

    newest = newest_complete(tuning.checkpoints)
    summary = trainer.train(resume_from_checkpoint=None if newest is None else str(newest)).metrics
    losses = losses_of(trainer.state.log_history, "loss")
    first_step, steps = 0 if newest is None else step_of(newest) or 0, trainer.state.global_step
    tokens = _step_tokens(trainer)
    return Trained(
        steps=steps,
        train_loss=losses[-1] if losses else summary["train_loss"],
        training_tokens=int(tokens * steps),
        tokens_per_second=tokens * (steps - first_step) / summary["train_runtime"],
        seconds=summary["train_runtime"],
    )


def _step_tokens(trainer: NextTokenTrainer) -> float:
    """Tokens of a step, on average."""
    train = trainer.train_dataset
    per_item = train.tokens / len(train)
    return per_item * trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps * trainer.args.world_size


def peak_rss_bytes() -> int:
    """The process's largest resident memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
