"""Fine-tune a model: a LoRA, on float or packed weights, or every weight; by transformers' Trainer, resumable."""

from __future__ import annotations

import dataclasses
import json
import logging
import resource
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantlab.adapters.adapter import Training
from quantlab.adapters.peft_folder import write_adapter_files
from quantlab.checkpoint import TensorEntry, load_tokenizer, open_checkpoint, open_writer
from quantlab.checkpoint.atomic import atomic_folder
from quantlab.checkpoint.chat_text import chat_template
from quantlab.checkpoint.checkpoint import Checkpoint
from quantlab.checkpoint.checksums import model_digest
from quantlab.checkpoint.export import check_outside
from quantlab.errors import InputError
from quantlab.training.adapted_model import check_base, fusion_of, peft_config_fields, trained_adapter, with_adapter
from quantlab.training.checkpoints import newest_complete, step_of
from quantlab.training.failures import TrainingFailedError
from quantlab.training.finetune_settings import CHECKPOINTING_FROM, FinetuneSettings
from quantlab.training.prepared import DataSettings, PreparedData, prepare_data

if TYPE_CHECKING:
    from quantlab.training.batches import SampleSet
    from quantlab.training.trainer import NextTokenTrainer, Progress

logger = logging.getLogger(__name__)
LOG = "training_log.json"


@dataclass(frozen=True)
class FinetuneResult:
    """Losses are nats per labelled token: `train_loss` the last logged mean, `eval_loss` of the held-out rows with the
    weights that were written, `eval_loss_before` of the model as it came; None without held-out rows. `adapter` is the
    folder that was written. Tokens count whether they carry loss or not, padding excepted.
    """

    steps: int
    train_loss: float
    eval_loss: float | None
    eval_loss_before: float | None
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


def finetune(
    model: str | Path,
    data: Path,
    out: Path,
    *,
    settings: FinetuneSettings | None = None,
    data_settings: DataSettings | None = None,
    template: str | None = None,
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
        device: "auto" (an accelerator if there is one), "cpu", or torch's name of a device.
        overwrite: whether an existing `out` may be replaced.

    Raises:
        InputError: wrong settings, model or data; an existing `out`; unfinished work in `<out>.training` without
            `resume`, or of another run.
        TrainingFailedError: the loss became NaN, or the accelerator's memory is too small.
    """
    settings = settings or FinetuneSettings()
    checkpoint = open_checkpoint(model)
    check_outside(checkpoint, out)
    modules = check_base(checkpoint, settings)
    _check_context(checkpoint, settings)
    work = out.with_name(out.name + ".training")
    _check_folders(out, work, resume, overwrite)
    template = chat_template(model) if template is None else template
    prepared = prepare_data(
        data, load_tokenizer(model), template, data_settings or DataSettings(context=settings.context, held_out=None)
    )
    digest = model_digest(checkpoint)
    run = _Run(checkpoint, modules, settings, prepared, work, digest, _chosen_device(device))
    _refuse_sharding_on_cpu(run.device)
    fresh = not work.exists()
    _check_same_run(run)
    try:
        return _train(run, model, out, overwrite, progress)
    except InputError:  # refused: there is nothing to resume
        if fresh:
            shutil.rmtree(work, ignore_errors=True)
        raise


def _check_context(checkpoint: Checkpoint, settings: FinetuneSettings) -> None:
    limit = checkpoint.config.get("max_position_embeddings", checkpoint.config.get("n_positions"))
    if isinstance(limit, int) and settings.context > limit:
        raise InputError(f"--context {settings.context}: the model has {limit} positions")


def _check_folders(out: Path, work: Path, resume: bool, overwrite: bool) -> None:
    if out.exists() and not overwrite:
        raise InputError(f"{out}: exists already; choose another name or pass --overwrite")
    if work.exists() and not resume and _is_first():
        raise InputError(f"{work}: holds an unfinished run; go on with --resume, or remove the folder")


def _is_first() -> bool:
    """Whether this is the only process, or the first of them, the one that writes."""
    import os

    return int(os.environ.get("RANK", "0")) == 0


def _chosen_device(device: str) -> str:
    import torch

    if device == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return "cpu" if accelerator is None else accelerator.type
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise InputError(f"--device {device}: choose auto, cpu, or an accelerator such as cuda") from None
    if kind != "cpu" and not torch.accelerator.is_available():
        raise InputError(f"--device {device}: torch finds no accelerator here; choose cpu")
    return kind


def _refuse_sharding_on_cpu(device: str) -> None:
    """accelerate would leave it out without a word."""
    import os

    if device == "cpu" and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true", "yes"):
        raise InputError("FSDP shards a model over accelerators only; on CPUs several processes share the data instead")


def _check_same_run(run: _Run) -> None:
    """Note what the run is made of when it starts; refuse to resume it with anything else, which would change it."""
    import torch

    from quantlab.training.trainer import processes

    identity = {
        "model": run.digest,
        "data": run.data.digest,
        "settings": dataclasses.asdict(run.settings),
        "threads": torch.get_num_threads(),
        "processes": processes(),
        "device": run.device,
    }
    note = run.work / "run.json"
    if note.exists():
        try:
            recorded = json.loads(note.read_text(encoding="utf-8"))
        except ValueError:
            recorded = {}
        if changed := [key for key, value in identity.items() if recorded.get(key) != value]:
            raise InputError(
                f"{run.work}: holds a run with another {', '.join(changed)}; resume with that, or remove the folder"
            )
    elif _is_first():
        run.work.mkdir(parents=True, exist_ok=True)
        partial = note.with_suffix(".partial")
        partial.write_text(json.dumps(identity), encoding="utf-8")
        partial.replace(note)


def _train(run: _Run, source: str | Path, out: Path, overwrite: bool, progress: Progress | None) -> FinetuneResult:
    from transformers import set_seed

    from quantlab.training.trainer import losses_of

    set_seed(run.settings.seed)
    model = _model(run, source)
    newest = newest_complete(run.work / "checkpoints")
    trainer = _trainer(run, model, newest is None, progress)
    summary = _run_trainer(trainer, newest, run.work)
    after = trainer.evaluate()["eval_loss"] if run.data.valid else None
    history = trainer.state.log_history
    losses, evaluations = losses_of(history, "loss"), losses_of(history, "eval_loss")
    first_step = 0 if newest is None else step_of(newest) or 0
    tokens = _step_tokens(trainer) * trainer.state.global_step
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    result = FinetuneResult(
        steps=trainer.state.global_step,
        train_loss=losses[-1] if losses else summary["train_loss"],
        eval_loss=after,
        eval_loss_before=evaluations[0] if evaluations else None,
        trainable_parameters=sum(trained),
        parameters=run.checkpoint.parameters,
        training_tokens=int(tokens),
        tokens_per_second=_step_tokens(trainer) * (trainer.state.global_step - first_step) / summary["train_runtime"],
        peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        adapter=str(out),
        method="merge-aware" if run.settings.merge_aware else run.settings.method,
        seconds=summary["train_runtime"],
        notes=tuple(run.data.notes),
    )
    if _is_first():
        _write(run, model, out, overwrite, history, result)
        shutil.rmtree(run.work)
    return result


def _model(run: _Run, source: str | Path) -> Any:  # Any: transformers' model, or peft's around it
    import torch

    from quantlab.loading import load_model
    from quantlab.training.next_token_loss import computes_loss

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
        run.work / "checkpoints",
        on_cpu=run.device == "cpu",
        pad=0,  # any id will do: no sample sees the padding, and it carries no loss
        gradient_checkpointing=run.checkpoint.parameters >= CHECKPOINTING_FROM if chosen is None else chosen,
        evaluate_first=is_fresh,
        progress=progress,
    )


def _sample_set(run: _Run) -> SampleSet:
    from quantlab.training.batches import packed, unpacked

    return packed(run.data.train, run.settings.context) if run.settings.packing else unpacked(run.data.train)


def _run_trainer(trainer: NextTokenTrainer, newest: Path | None, work: Path) -> dict[str, float]:
    """Train to the end; the Trainer's summary."""
    import torch

    def kept() -> str:
        good = newest_complete(work / "checkpoints")
        return "no checkpoint was complete yet" if good is None else f"the last good checkpoint is {good}"

    try:
        return trainer.train(resume_from_checkpoint=None if newest is None else str(newest)).metrics
    except TrainingFailedError as error:
        advice = "lower --learning-rate or --gradient-clip, and look at the rows of that step"
        raise TrainingFailedError(f"{error}; {kept()}; {advice}") from None
    except torch.OutOfMemoryError:
        advice = "use --gradient-checkpointing, a smaller --batch-size or --context, or --device cpu"
        raise TrainingFailedError(f"the accelerator is out of memory; {kept()}; {advice}") from None


def _step_tokens(trainer: NextTokenTrainer) -> float:
    """Tokens of a step, on average."""
    train = trainer.train_dataset
    per_item = train.tokens / len(train)
    return per_item * trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps * trainer.args.world_size


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
    )
    adapter = trained_adapter(model, run.checkpoint, run.settings, training)
    with atomic_folder(out, overwrite) as folder:
        write_adapter_files(adapter, peft_config_fields(model, str(run.checkpoint.path)), folder)
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
