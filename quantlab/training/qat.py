"""Quantization-aware training: what was trained is what is written, byte for byte."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantlab.calibration.heap import return_large_pieces
from quantlab.checkpoint import open_checkpoint
from quantlab.checkpoint.checkpoint import Checkpoint
from quantlab.checkpoint.checksums import model_digest
from quantlab.checkpoint.export import check_beside
from quantlab.errors import InputError
from quantlab.training.finetune_settings import FinetuneSettings
from quantlab.training.finetune_work import check_same_run, tidy
from quantlab.training.prepared import DataSettings
from quantlab.training.qat_plan import QatPlan, plan_qat
from quantlab.training.qat_settings import QatSettings
from quantlab.training.qat_start import START, quantized_start
from quantlab.training.surroundings import is_first_process, leave_group_at_exit
from quantlab.training.tuning import (
    Request,
    Tuning,
    checked,
    explained_failures,
    open_model,
    peak_rss_bytes,
    train_to_the_end,
    tuning_trainer,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from quantlab.training.distillation import HeldOut
    from quantlab.training.qat_model import QatModel
    from quantlab.training.trainer import NextTokenTrainer, Progress

BEFORE = "before.json"


@dataclass(frozen=True)
class QatResult:
    """Losses and divergences are nats per labelled token.

    `train_loss` is the last logged mean of what was trained for: the divergence from the teacher (times the square of
    the temperature) with one, else the next-token loss. `eval_loss` and `eval_loss_before` are next-token losses of the
    held-out rows, `kld_before` and `kld_after` the mean KL divergence from a reference's predictions on them at
    temperature 1: of what the model was before any step (rounded to nearest, or whatever `method` made of it; a
    quantized model as it came), and of what was written. The reference is the teacher; without one, the original, if it
    is float; else there is none. `test_loss` is that of the folder's test file. All of them are None without such rows.
    `bytes` counts the written tensors'.
    """

    steps: int
    train_loss: float
    eval_loss: float | None
    eval_loss_before: float | None
    test_loss: float | None
    kld_before: float | None
    kld_after: float | None
    trainable_parameters: int
    parameters: int
    training_tokens: int
    tokens_per_second: float
    peak_rss_bytes: int
    bytes: int
    out: str
    train: str
    seconds: float
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Run:
    tuning: Tuning
    teacher: str | Path | None
    plan: QatPlan
    qat: QatSettings

    @property
    def is_float(self) -> bool:
        """Whether the model came unquantized."""
        return self.tuning.checkpoint.recipe is None


def qat(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    settings: QatSettings | None = None,
    training: FinetuneSettings | None = None,
    data_settings: DataSettings | None = None,
    teacher: str | Path | None = None,
    template: str | None = None,
    end_token: str | None = None,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> QatResult:
    """Train a model for the blocks it will be stored in, and write these to `out`, a folder or a GGUF file.

    Forward passes multiply by the blocks that the weights pack to at that step; gradients pass straight through. Work
    at hand lies in `<out>.training`, and a run that goes on with `resume` ends with the bytes of an uninterrupted one,
    on the same machine with the same number of threads.

    Args:
        model: folder, GGUF file or hub id; float, or with `settings.train` "scales" and "minimums" quantized too.
        data: file or folder, see `prepared`.
        settings: formats, and what is trained.
        training: as fine-tuning has them; `method` is set here, the learning rate too where it is not given.
        teacher: a model of the same vocabulary, float or quantized, whose predictions are the aim in place of the text.
        template: a chat template instead of the model's own.
        end_token: a token to end texts with, instead of the tokenizer's own.
        device: "auto" (an accelerator if there is one), "cpu", or torch's name of a device.
        overwrite: whether an existing `out` may be replaced.

    Raises:
        InputError: wrong settings, model, teacher or data; an existing `out`; unfinished work in `<out>.training`
            without `resume`, or of another run.
        TrainingFailedError: loss or weights became NaN or too large for the format, or memory or the disk is too small.
    """
    chosen = settings or QatSettings()
    tuned = chosen.training(training or FinetuneSettings())
    request = Request(model, Path(data), Path(out), data_settings, template, end_token, device, resume, overwrite)
    checkpoint = open_model(request, tuned)
    plan = plan_qat(checkpoint, chosen, tuned)
    digest = None if teacher is None else _checked_teacher(checkpoint, model, teacher, request.out, tuned)
    run = _Run(checked(request, checkpoint, tuned), teacher, plan, chosen)
    _refuse_sharding()
    _check_warmup(run)
    check_same_run(run.tuning.work, _identity(run, digest))
    with explained_failures(run.tuning.work, lambda work: _tidy(run, work)):
        result = _train(run, progress)
    leave_group_at_exit()
    return result


def _tidy(run: _Run, work: Path) -> None:
    """After a run that did not end; first codes that took calibration are kept for `resume`."""
    if run.qat.method == "rtn" or not any(work.glob(f"{START}*")):
        tidy(work)


def _checked_teacher(
    checkpoint: Checkpoint, model: str | Path, teacher: str | Path, out: Path, settings: FinetuneSettings
) -> str:
    """The digest of a teacher that fits the model."""
    from quantlab.training.distillation import check_teacher

    other = open_checkpoint(teacher)
    check_beside(other, out)
    check_teacher(checkpoint, other, (str(model), str(teacher)), settings.context)
    return model_digest(other)


def _refuse_sharding() -> None:
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true", "yes"):
        raise InputError("FSDP cannot shard weights that are packed for every product; train data-parallel, or on one")


def _check_warmup(run: _Run) -> None:
    from quantlab.training.trainer import planned_steps

    steps = planned_steps(run.tuning.settings, len(run.tuning.samples()))
    if run.qat.float_steps >= steps:
        raise InputError(f"--float-steps {run.qat.float_steps}: the run has {steps} steps, and none would be quantized")


def _identity(run: _Run, teacher_digest: str | None) -> dict[str, Any]:
    """What a resumed run must have in common with the one that began."""
    return run.tuning.identity(
        teacher=teacher_digest,
        formats={name: [format.name, format.levels] for name, format in run.plan.formats.items()},
        settings=[dataclasses.asdict(settings) for settings in (run.qat, run.tuning.settings)],
    )


def _train(run: _Run, progress: Progress | None) -> QatResult:
    from transformers import set_seed

    return_large_pieces()
    tuning = run.tuning
    start = quantized_start(tuning, run.qat) if run.qat.trains_scales and run.is_float else tuning.checkpoint
    set_seed(tuning.settings.seed)
    prepared = _model(run, start)
    teacher = None if run.teacher is None else _reference(run)
    before = _figures_before(run, prepared, teacher)
    trainer = _trainer(run, prepared.model, teacher, progress)
    trained = train_to_the_end(tuning, trainer)
    after, tested = _figures(run, prepared, teacher), _test_loss(run, prepared)
    result = QatResult(
        **dataclasses.asdict(trained),
        eval_loss=None if after is None else after.loss,
        eval_loss_before=None if before is None else before.loss,
        test_loss=tested,
        kld_before=None if before is None else before.kld,
        kld_after=None if after is None else after.kld,
        trainable_parameters=sum(p.numel() for p in prepared.model.parameters() if p.requires_grad),
        parameters=tuning.checkpoint.parameters,
        peak_rss_bytes=peak_rss_bytes(),
        bytes=0,
        out=str(tuning.out),
        train=run.qat.train,
        notes=(*run.plan.notes, *tuning.data.notes),
    )
    if is_first_process():
        from quantlab.training.qat_writing import write_trained

        account = _account(run, trainer.state.log_history)
        result = write_trained(start, prepared, run.plan, run.qat, result, account, tuning.out, tuning.overwrite)
        shutil.rmtree(tuning.work)
    return result


def _model(run: _Run, start: Checkpoint) -> QatModel:
    from quantlab.training.qat_model import float_model_for_qat, packed_model_for_qat

    settings, device = run.tuning.settings, run.tuning.device
    if run.qat.trains_scales:
        only = run.qat.train == "minimums"
        return packed_model_for_qat(start.path, settings, device, minimums_only=only)
    return float_model_for_qat(run.tuning.source, run.plan, settings, device)


def _reference(run: _Run) -> PreTrainedModel | None:
    """The teacher, or the float original."""
    import torch

    from quantlab.loading import load_model

    if run.teacher is None and not run.is_float:
        return None
    source = run.tuning.source if run.teacher is None else run.teacher
    dtype = getattr(torch, run.tuning.settings.dtype)
    return load_model(source, dtype=dtype, device=run.tuning.device).requires_grad_(False)


def _figures(run: _Run, prepared: QatModel, teacher: PreTrainedModel | None) -> HeldOut | None:
    """Of the model as it stands; without a teacher, the original is in memory for the moment."""
    from quantlab.training.distillation import held_out_figures

    held_out = run.tuning.held_out()
    if held_out is None:
        return None
    reference = _reference(run) if teacher is None else teacher
    return held_out_figures(prepared.model, held_out, run.tuning.settings.batch_size, reference)


def _test_loss(run: _Run, prepared: QatModel) -> float | None:
    from quantlab.training.batches import unpacked
    from quantlab.training.distillation import held_out_figures

    test = run.tuning.data.test
    if not test:
        return None
    return held_out_figures(prepared.model, unpacked(test), run.tuning.settings.batch_size, None).loss


def _figures_before(run: _Run, prepared: QatModel, teacher: PreTrainedModel | None) -> HeldOut | None:
    """Computed when the run begins, and remembered."""
    from quantlab.checkpoint.atomic import atomic_file
    from quantlab.training.distillation import HeldOut

    file = run.tuning.work / BEFORE
    if file.is_file():
        said = json.loads(file.read_text(encoding="utf-8"))
        return None if said is None else HeldOut(**said)
    figures = _figures(run, prepared, teacher)
    if is_first_process():
        with atomic_file(file, replace=True) as path:
            path.write_text(json.dumps(None if figures is None else dataclasses.asdict(figures)), encoding="utf-8")
    return figures


def _trainer(
    run: _Run, model: PreTrainedModel, teacher: PreTrainedModel | None, progress: Progress | None
) -> NextTokenTrainer:
    from quantlab.training.distillation import Student
    from quantlab.training.qat_trainer import FloatWarmup, QatTrainer

    student = Student(model, teacher, run.qat.temperature)
    trainer = tuning_trainer(run.tuning, student, progress, QatTrainer)
    trainer.add_callback(FloatWarmup(model, run.qat.float_steps))
    return trainer


def _account(run: _Run, history: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What training_log.json says beside the result."""
    return {
        "settings": {"qat": dataclasses.asdict(run.qat), "training": dataclasses.asdict(run.tuning.settings)},
        "model": str(run.tuning.checkpoint.path),
        "model_digest": run.tuning.digest,
        "teacher": None if run.teacher is None else str(run.teacher),
        "data_digest": run.tuning.data.digest,
        "log": list(history),
    }
