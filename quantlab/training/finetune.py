"""Fine-tune a model: a LoRA, on float or packed weights, or every weight; by transformers' Trainer, resumable."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantlab.adapters.adapter import Training
from quantlab.adapters.peft_folder import write_adapter_files
from quantlab.calibration.heap import return_large_pieces
from quantlab.checkpoint import TensorEntry, open_writer
from quantlab.checkpoint.atomic import atomic_folder
from quantlab.checkpoint.chat_templates import CHAT_TEMPLATE_FILE
from quantlab.training.adapted_model import check_base, fusion_of, peft_config_fields, trained_adapter, with_adapter
from quantlab.training.finetune_settings import FinetuneSettings
from quantlab.training.finetune_work import check_same_run, tidy
from quantlab.training.prepared import DataSettings
from quantlab.training.surroundings import is_first_process, leave_group_at_exit
from quantlab.training.tuning import (
    LOG,
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
    from quantlab.training.trainer import NextTokenTrainer, Progress

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
    settings = settings or FinetuneSettings()
    request = Request(model, Path(data), Path(out), data_settings, template, end_token, device, resume, overwrite)
    checkpoint = open_model(request, settings)
    modules = check_base(checkpoint, settings)
    tuning = checked(request, checkpoint, settings)
    check_same_run(tuning.work, tuning.identity(settings=dataclasses.asdict(settings)))
    with explained_failures(tuning.work, tidy):
        result = _train(tuning, modules, progress)
    leave_group_at_exit()
    return result


def _train(tuning: Tuning, modules: list[str], progress: Progress | None) -> FinetuneResult:
    from transformers import set_seed

    from quantlab.training.trainer import losses_of

    set_seed(tuning.settings.seed)
    model = _model(tuning, modules)
    trainer = tuning_trainer(tuning, model, progress, autocast=tuning.settings.autocast)
    trained = train_to_the_end(tuning, trainer)
    after = trainer.evaluate()["eval_loss"] if tuning.data.valid else None
    tested = _test_loss(trainer, tuning)
    history = trainer.state.log_history
    evaluations = losses_of(history, "eval_loss")
    result = FinetuneResult(
        **dataclasses.asdict(trained),
        eval_loss=after,
        eval_loss_before=evaluations[0] if evaluations else None,
        test_loss=tested,
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        parameters=tuning.checkpoint.parameters,
        peak_rss_bytes=peak_rss_bytes(),
        adapter=str(tuning.out),
        method="merge-aware" if tuning.settings.merge_aware else tuning.settings.method,
        notes=tuple(tuning.data.notes),
    )
    if is_first_process():
        _write(tuning, model, history, result)
        _keep_logs(tuning.checkpoints / LOGGERS_FOLDER, tuning.out / LOGGERS_FOLDER)
        shutil.rmtree(tuning.work)
    return result


def _test_loss(trainer: NextTokenTrainer, tuning: Tuning) -> float | None:
    from quantlab.training.batches import unpacked

    test = tuning.data.test
    return trainer.evaluate(unpacked(test), metric_key_prefix="test")["test_loss"] if test else None


def _model(tuning: Tuning, modules: list[str]) -> Any:  # Any: transformers' model, or peft's around it
    import torch

    from quantlab.loading import load_model
    from quantlab.training.next_token_loss import computes_loss

    return_large_pieces()
    settings, checkpoint = tuning.settings, tuning.checkpoint
    can_int8 = tuning.device == "cpu" and any(checkpoint.format(name) is not None for name in checkpoint.names)
    activations = ("int8" if can_int8 else "float") if settings.activations == "auto" else settings.activations
    dtype = torch.float32 if settings.autocast else getattr(torch, settings.dtype)
    model = load_model(tuning.source, dtype=dtype, device=tuning.device, activations=activations)
    if settings.method == "full":
        model.requires_grad_(True)
        computes_loss(model)
        return model
    computes_loss(model)
    return with_adapter(model, checkpoint, modules, settings)


def _keep_logs(folder: Path, destination: Path) -> None:
    """What tensorboard shows is worth more than the checkpoints beside it."""
    if folder.is_dir():
        shutil.move(folder, destination)


def _write(tuning: Tuning, model: Any, history: Sequence[dict[str, Any]], result: FinetuneResult) -> None:
    checkpoint, settings = tuning.checkpoint, tuning.settings
    log = json.dumps(
        {
            "result": dataclasses.asdict(result),
            "settings": dataclasses.asdict(settings),
            "model": str(checkpoint.path),
            "model_digest": tuning.digest,
            "data_digest": tuning.data.digest,
            "log": list(history),
        },
        indent=2,
    )
    if settings.method == "full":
        _write_model(tuning, model, log)
        return
    fusion = fusion_of(settings)
    training = Training(
        base=tuning.digest,
        regrid=fusion is not None and fusion.regrid,
        levels=None if fusion is None else fusion.levels,
        device=tuning.device,
        vocabulary=checkpoint.config.get("vocab_size", 0),
    )
    adapter = trained_adapter(model, checkpoint, settings, training)
    with atomic_folder(tuning.out, tuning.overwrite) as folder:
        write_adapter_files(adapter, peft_config_fields(model, _name(tuning.source)), folder)
        (folder / LOG).write_text(log + "\n", encoding="utf-8")


def _name(model: str | Path) -> str:
    """What adapter_config.json calls the base: a place that holds in any folder, or a hub id."""
    path = Path(model).expanduser()
    return os.path.abspath(path) if path.exists() else str(model)  # noqa: PTH100 links keep their names


def _write_model(tuning: Tuning, model: Any, log: str) -> None:
    """The trained weights as a model folder, each in the element type that it had, with the chat template of the
    training.
    """
    from quantlab.checkpoint.folder_writer import FolderWriter
    from quantlab.checkpoint.tensors import torch_dtype

    checkpoint, state = tuning.checkpoint, model.state_dict()
    entries = [TensorEntry(name, checkpoint.entry(name).dtype, checkpoint.shape(name)) for name in checkpoint.names]
    with open_writer(tuning.out, entries, checkpoint.config, companions=checkpoint, replace=tuning.overwrite) as writer:
        for entry in entries:
            weight = state[entry.name].detach().cpu()
            if checkpoint.family.is_transposed(entry.name):
                weight = weight.T
            writer.write(entry.name, weight.to(torch_dtype(entry.dtype)).contiguous())
        if isinstance(writer, FolderWriter):
            writer.add_file(LOG, (log + "\n").encode())
            if tuning.template is not None:
                writer.add_file(CHAT_TEMPLATE_FILE, tuning.template.encode())
