"""Fine-tune a model: a LoRA, on float or packed weights, or every weight; by transformers' Trainer, resumable."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import resource
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantlab.adapters.adapter import Training
from quantlab.adapters.peft_folder import write_adapter_files
from quantlab.calibration.heap import return_large_pieces
from quantlab.checkpoint import TensorEntry, load_tokenizer, open_checkpoint, open_writer
from quantlab.checkpoint.atomic import atomic_folder
from quantlab.checkpoint.chat_text import chat_template
from quantlab.checkpoint.checkpoint import Checkpoint
from quantlab.checkpoint.checksums import model_digest
from quantlab.checkpoint.export import check_beside
from quantlab.errors import InputError
from quantlab.training.adapted_model import check_base, fusion_of, peft_config_fields, trained_adapter, with_adapter
from quantlab.training.checkpoints import newest_complete, step_of
from quantlab.training.finetune_settings import CHECKPOINTING_FROM, FinetuneSettings
from quantlab.training.finetune_work import CHECKPOINTS, check_folders, check_same_run, explained, tidy, work_of
from quantlab.training.prepared import DataSettings, PreparedData, prepare_data
from quantlab.training.surroundings import check_packages, chosen_device, is_first_process, refuse_sharding_on_cpu
from quantlab.training.text_labels import with_end_token

if TYPE_CHECKING:
    from quantlab.training.batches import SampleSet
    from quantlab.training.trainer import NextTokenTrainer, Progress

logger = logging.getLogger(__name__)
LOG = "training_log.json"
LOGGERS_FOLDER = "runs"  # transformers' name for tensorboard's files


@dataclass(frozen=True)
class FinetuneResult:
    """Losses are nats per labelled token: `train_loss` the last logged mean, `eval_loss` of the held-out rows with the
    weights that were written, `eval_loss_before` of the model as it came, `test_loss` of the folder's test file; None
    without such rows. `adapter` is the folder that was written. Tokens count whether they carry loss or not, padding
    excepted.
    """

    steps: int
    train_loss: float
    eval_loss: float | None
    eval_loss_before: float | None
    test_loss: float | None
    trainable_parameters: int
    parameters: int
    training_tokens: int
    tokens_per_second: float
    peak_rss_bytes: int
    adapter: str
    method: str
    seconds: float
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Run:
    checkpoint: Checkpoint
    modules: list[str]
    settings: FinetuneSettings
    data: PreparedData
    work: Path
    digest: str
    device: str
    base: str


def finetune(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    settings: FinetuneSettings | None = None,
    data_settings: DataSettings | None = None,
    template: str | None = None,
    end_token: str | None = None,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> FinetuneResult:
    """Train on `data` and write the adapter (peft's two files) or, with method "full", the model to the folder `out`.

    Checkpoints live in `<out>.training` until `out` is complete. A run that was interrupted and goes on with `resume`
    ends with the bytes of an uninterrupted one, on the same machine with the same number of threads.

    Args:
        model: folder, GGUF file or hub id; a quantized one makes it QLoRA, and its blocks stay as they are.
        data: file or folder, see `prepared`.
        template: a chat template instead of the model's own.
        end_token: a token to end texts with, such as "<|im_end|>", instead of the tokenizer's own.
        device: "auto" (an accelerator if there is one), "cpu", or torch's name of a device.
        overwrite: whether an existing `out` may be replaced.

    Raises:
        InputError: wrong settings, model or data; a package that is not installed; an existing `out`; unfinished work
            in `<out>.training` without `resume`, or of another run.
        TrainingFailedError: the loss became NaN, or memory or the disk is too small.
    """
    settings, data, out = settings or FinetuneSettings(), Path(data), Path(out)
    check_packages(settings)
    work = work_of(out)
    checkpoint = open_checkpoint(model)
    check_beside(checkpoint, out)
    modules = check_base(checkpoint, settings)
    check_context(checkpoint, settings)
    check_folders(data, out, work, resume, overwrite)
    data_settings = data_settings or DataSettings(context=settings.context, held_out=None)
    prepared = prepared_rows(model, data, data_settings, template, end_token)
    check_held_out(settings, prepared)
    run = _Run(
        checkpoint, modules, settings, prepared, work, model_digest(checkpoint), chosen_device(device), _name(model)
    )
    refuse_sharding_on_cpu(run.device)
    check_same_run(work, _identity(run))
    try:
        return _train(run, model, out, overwrite, progress)
    except BaseException as error:
        failure = explained(error, work) if isinstance(error, Exception) else None
        tidy(work)
        if failure is not None:
            raise failure from None
        raise


def _name(model: str | Path) -> str:
    """What adapter_config.json calls the base: a place that holds in any folder, or a hub id."""
    path = Path(model).expanduser()
    return os.path.abspath(path) if path.exists() else str(model)  # noqa: PTH100 links keep their names


def prepared_rows(
    model: str | Path, data: Path, settings: DataSettings, template: str | None, end_token: str | None
) -> PreparedData:
    """`prepare_data` with the model's tokenizer, and its chat template and end token or the given ones."""
    tokenizer = load_tokenizer(model)
    known = tokenizer.eos
    if end_token is not None:
        tokenizer = with_end_token(tokenizer, end_token)
    prepared = prepare_data(data, tokenizer, chat_template(model) if template is None else template, settings)
    if not tokenizer.eos <= known:
        prepared.notes.append(
            f"texts end with {end_token!r} in training, and {model} does not stop there by itself: "
            f"name it as eos_token_id in its generation_config.json, or generate with --stop"
        )
    return prepared


def check_context(checkpoint: Checkpoint, settings: FinetuneSettings) -> None:
    """Refuse samples longer than the model's positions.

    Raises:
        InputError: they are.
    """
    limit = checkpoint.config.get("max_position_embeddings", checkpoint.config.get("n_positions"))
    if isinstance(limit, int) and settings.context > limit:
        raise InputError(f"--context {settings.context}: the model has {limit} positions")


def check_held_out(settings: FinetuneSettings, data: PreparedData) -> None:
    """Refuse to stop early by rows that are not there.

    Raises:
        InputError: none are held out.
    """
    if settings.early_stopping is not None and not data.valid:
        raise InputError(
            "--early-stopping: no rows are held out to judge by; give --eval-split, or a folder with a valid file"
        )


def _identity(run: _Run) -> dict[str, Any]:
    """What a resumed run must have in common with the one that began."""
    import torch

    from quantlab.training.trainer import processes

    return {
        "model": run.digest,
        "data": run.data.digest,
        "settings": dataclasses.asdict(run.settings),
        "threads": torch.get_num_threads(),
        "processes": processes(),
        "device": run.device,
    }


def _train(run: _Run, source: str | Path, out: Path, overwrite: bool, progress: Progress | None) -> FinetuneResult:
    from transformers import set_seed

    from quantlab.training.trainer import losses_of

    set_seed(run.settings.seed)
    model = _model(run, source)
    newest = newest_complete(run.work / CHECKPOINTS)
    trainer = _trainer(run, model, newest is None, progress)
    summary = trainer.train(resume_from_checkpoint=None if newest is None else str(newest)).metrics
    after = trainer.evaluate()["eval_loss"] if run.data.valid else None
    tested = _test_loss(trainer, run.data)
    history = trainer.state.log_history
    losses, evaluations = losses_of(history, "loss"), losses_of(history, "eval_loss")
    first_step = 0 if newest is None else step_of(newest) or 0
    tokens = step_tokens(trainer) * trainer.state.global_step
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    result = FinetuneResult(
        steps=trainer.state.global_step,
        train_loss=losses[-1] if losses else summary["train_loss"],
        eval_loss=after,
        eval_loss_before=evaluations[0] if evaluations else None,
        test_loss=tested,
        trainable_parameters=sum(trained),
        parameters=run.checkpoint.parameters,
        training_tokens=int(tokens),
        tokens_per_second=step_tokens(trainer) * (trainer.state.global_step - first_step) / summary["train_runtime"],
        peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        adapter=str(out),
        method="merge-aware" if run.settings.merge_aware else run.settings.method,
        seconds=summary["train_runtime"],
        notes=tuple(run.data.notes),
    )
    if is_first_process():
        _write(run, model, out, overwrite, history, result)
        _keep_logs(run.work / CHECKPOINTS / LOGGERS_FOLDER, out / LOGGERS_FOLDER)
        shutil.rmtree(run.work)
    return result


def _test_loss(trainer: NextTokenTrainer, data: PreparedData) -> float | None:
    from quantlab.training.batches import unpacked

    return trainer.evaluate(unpacked(data.test), metric_key_prefix="test")["test_loss"] if data.test else None


def _model(run: _Run, source: str | Path) -> Any:  # Any: transformers' model, or peft's around it
    import torch

    from quantlab.loading import load_model
    from quantlab.training.next_token_loss import computes_loss

    return_large_pieces()
    settings = run.settings
    can_int8 = run.device == "cpu" and any(run.checkpoint.format(name) is not None for name in run.checkpoint.names)
    activations = ("int8" if can_int8 else "float") if settings.activations == "auto" else settings.activations
    dtype = getattr(torch, settings.dtype)
    model = load_model(source, dtype=dtype, device=run.device, activations=activations)
    if settings.method == "full":
        model.requires_grad_(True)
        computes_loss(model)
        return model
    computes_loss(model)
    return with_adapter(model, run.checkpoint, run.modules, settings)


def _trainer(run: _Run, model: Any, is_fresh: bool, progress: Progress | None) -> NextTokenTrainer:
    from quantlab.training.batches import unpacked
    from quantlab.training.trainer import make_trainer

    chosen = run.settings.gradient_checkpointing
    return make_trainer(
        model,
        run.settings,
        _sample_set(run),
        unpacked(run.data.valid) if run.data.valid else None,
        run.work / CHECKPOINTS,
        on_cpu=run.device == "cpu",
        pad=0,  # any id will do: no sample sees the padding, and it carries no loss
        gradient_checkpointing=run.checkpoint.parameters >= CHECKPOINTING_FROM if chosen is None else chosen,
        evaluate_first=is_fresh,
        progress=progress,
    )


def _sample_set(run: _Run) -> SampleSet:
    from quantlab.training.batches import packed, unpacked

    return packed(run.data.train, run.settings.context) if run.settings.packing else unpacked(run.data.train)


def step_tokens(trainer: NextTokenTrainer) -> float:
    """Tokens of a step, on average."""
    train = trainer.train_dataset
    per_item = train.tokens / len(train)
    return per_item * trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps * trainer.args.world_size


def _keep_logs(folder: Path, destination: Path) -> None:
    """What tensorboard shows is worth more than the checkpoints beside it."""
    if folder.is_dir():
        shutil.move(folder, destination)


def _write(
    run: _Run, model: Any, out: Path, overwrite: bool, history: Sequence[dict[str, Any]], result: FinetuneResult
) -> None:
    log = json.dumps(
        {
            "result": dataclasses.asdict(result),
            "settings": dataclasses.asdict(run.settings),
            "model": str(run.checkpoint.path),
            "model_digest": run.digest,
            "data_digest": run.data.digest,
            "log": list(history),
        },
        indent=2,
    )
    if run.settings.method == "full":
        _write_model(run.checkpoint, model, out, overwrite, log)
        return
    fusion = fusion_of(run.settings)
    training = Training(
        base=run.digest,
        regrid=fusion is not None and fusion.regrid,
        levels=None if fusion is None else fusion.levels,
        device=run.device,
        vocabulary=run.checkpoint.config.get("vocab_size", 0),
    )
    adapter = trained_adapter(model, run.checkpoint, run.settings, training)
    with atomic_folder(out, overwrite) as folder:
        write_adapter_files(adapter, peft_config_fields(model, run.base), folder)
        (folder / LOG).write_text(log + "\n", encoding="utf-8")


def _write_model(checkpoint: Checkpoint, model: Any, out: Path, overwrite: bool, log: str) -> None:
    """The trained weights as a model folder, each in the element type that it had."""
    from quantlab.checkpoint.folder_writer import FolderWriter
    from quantlab.checkpoint.tensors import torch_dtype

    state = model.state_dict()
    entries = [TensorEntry(name, checkpoint.entry(name).dtype, checkpoint.shape(name)) for name in checkpoint.names]
    with open_writer(out, entries, checkpoint.config, companions=checkpoint, replace=overwrite) as writer:
        for entry in entries:
            weight = state[entry.name].detach().cpu()
            if checkpoint.family.is_transposed(entry.name):
                weight = weight.T
            writer.write(entry.name, weight.to(torch_dtype(entry.dtype)).contiguous())
        if isinstance(writer, FolderWriter):
            writer.add_file(LOG, (log + "\n").encode())
