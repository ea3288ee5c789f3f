"""Learned scales: after another quantizer, d and m of all blocks are trained together against the original model.

The distillation of mlx-lm's DWQ and of EfficientQAT's second stage (arXiv 2407.11062): codes stay, and the divergence
of the whole model's predictions from the original's is brought down by the scales alone, so the file keeps its formats
and its size. Codes may be trained too, which takes 16 bytes of memory for every weight.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantlab.calibration.calibrated import usable_threads
from quantlab.calibration.padded_windows import PaddedWindows, pad_windows
from quantlab.calibration.recomputing import recompute_if_large
from quantlab.checkpoint import Checkpoint, open_checkpoint, open_writer
from quantlab.checkpoint.atomic import atomic_file
from quantlab.checkpoint.checksums import model_digest
from quantlab.checkpoint.export import check_outside, packed_config
from quantlab.errors import InputError

if TYPE_CHECKING:
    import torch

    from quantlab.calibration.scale_training import Schedule, TrainingResult
    from quantlab.formats import PackedTensor

EVALUATIONS = 12  # in a run
METHOD = "learned"
RUN, STATE, TEACHER = "learned-run.txt", "learned-state.pt", "learned-teacher"

Progress = Callable[[int, int, str], None]  # (tokens done, tokens in all, what is happening)


@dataclass(frozen=True)
class LearnSettings:
    """How scales are learned.

    Learning rates are steps of Adam at their highest: `learning_rate` moves weights by that share of their block's d,
    `norm_rate` norms by that share of their root mean square, `code_rate` latent codes by that many codes.

    A step reads `step_tokens` in parts of at most `window_tokens`, which are what threads divide among themselves.
    """

    steps: int = 400
    step_tokens: int = 512
    window_tokens: int = 256
    learning_rate: float = 5e-3
    norm_rate: float = 3e-4
    code_rate: float = 1e-2
    temperature: float = 2.0
    train_norms: bool = False
    train_codes: bool = False
    patience: int = 4
    save_seconds: float = 120.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "step_tokens", "window_tokens", "patience"):
            if getattr(self, name) < 1:
                raise InputError(f"learned: {name} is {getattr(self, name)}; at least 1 is needed")
        for name in ("learning_rate", "norm_rate", "code_rate", "temperature"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(f"learned: {name} is {getattr(self, name)}; it must be positive and finite")


@dataclass(frozen=True)
class LearnReport:
    """Divergences are nats per token from the original model on held-out calibration windows, at temperature 1.

    `best_step` is that of the written state; 0 where no step was better than the start, which was kept then. `history`
    holds (step, divergence); `trained` counts numbers.
    """

    steps: int
    best_step: int
    start_divergence: float
    best_divergence: float
    history: tuple[tuple[int, float], ...]
    training_tokens: int
    held_out_tokens: int
    trained: int
    seconds: float
    notes: tuple[str, ...]


def learn_scales(
    source: str | Path,
    quantized: str | Path,
    samples: Sequence[Sequence[int]],
    out: Path,
    work: Path,
    settings: LearnSettings | None = None,
    *,
    overwrite: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> LearnReport:
    """Train the scales of a quantized model and write it again with them: the same formats, the same size.

    Equal arguments give equal bytes on one machine, for any number of threads; on another processor torch's matrix
    products may differ in their last bits. A run that was killed goes on from its last saved state in `work`, with any
    number of threads, and ends with the bytes of an uninterrupted one.

    Args:
        source: the original float model: folder, GGUF file or hub id.
        quantized: the model to start from, quantized from `source`.
        samples: token ids of the calibration windows; some are held out to choose the best state. A window is never
            divided, so more threads than a step has windows are of no use (see `LearnSettings.window_tokens`).
        out: folder to make, or GGUF file if its name ends in `.gguf`.
        work: folder for unfinished work, made if missing; what the same run left there is gone on with.
        overwrite: whether an existing `out` may be replaced.
        threads: the most to use on a CPU, by default one a core.

    Raises:
        InputError: a model cannot be read, the two have different tensors, nothing is quantized, too few samples or ids
            beyond the vocabulary, unfinished work of another run, an `out` that exists or is one of the models.
    """
    from quantlab.quantization.workers import one_thread_each

    started, chosen = time.monotonic(), settings or LearnSettings()
    original, start = open_checkpoint(source), open_checkpoint(quantized)
    _check(original, start, out, overwrite)
    vocabulary = start.shape(start.family.embedding)[0]
    windows = pad_windows(samples, vocabulary, chosen.seed)
    _claim(work, _identity(original, start, windows, chosen))
    with one_thread_each():
        trained, result, count = _train(original, start, windows, chosen, work, usable_threads(threads), progress)
    notes = []
    if result.best_step == 0:
        trained, notes = {}, ["no step of learning was better than the start on held-out windows; the start was kept"]
    _write(original, start, trained, {**_decisive(chosen), "best_step": result.best_step}, out, overwrite)
    for file in (work / STATE, work / RUN):
        file.unlink(missing_ok=True)
    shutil.rmtree(work / TEACHER, ignore_errors=True)
    return LearnReport(
        **asdict(result),
        training_tokens=windows.tokens(windows.training),
        held_out_tokens=windows.tokens(windows.held_out),
        trained=count,
        seconds=time.monotonic() - started,
        notes=tuple(notes),
    )


def _check(original: Checkpoint, start: Checkpoint, out: Path, overwrite: bool) -> None:
    if out.exists() and not overwrite:
        raise InputError(f"{out}: exists already; choose another name or pass --overwrite")
    for checkpoint in (original, start):
        check_outside(checkpoint, out)
    if all(start.format(name) is None for name in start.names):
        raise InputError(f"{start.path}: holds no quantized tensor whose scales could be learned")
    shapes = [{name: checkpoint.shape(name) for name in checkpoint.names} for checkpoint in (original, start)]
    if shapes[0] != shapes[1]:
        raise InputError(f"{start.path}: has other tensors than {original.path}; give the model that it was made from")


def _train(
    original: Checkpoint,
    start: Checkpoint,
    windows: PaddedWindows,
    settings: LearnSettings,
    work: Path,
    threads: int,
    progress: Progress | None,
) -> tuple[dict[str, PackedTensor | torch.Tensor], TrainingResult, int]:
    """The trained tensors by name, what the training says, and how many numbers were trained."""
    import torch

    from quantlab.calibration.learnable_parts import LearnableParts
    from quantlab.calibration.scale_training import ScaleTraining
    from quantlab.calibration.teacher import LiveTeacher, open_teacher
    from quantlab.loading import load_model
    from quantlab.quantization.workers import check_at_every_matrix

    device = torch.device("cpu")
    if torch.accelerator.is_available():
        device, threads = torch.accelerator.current_accelerator() or device, 1
    schedule = _schedule(settings, windows)
    model = load_model(original.path, device=device)
    check_at_every_matrix(model)
    say = None if progress is None else _teacher_progress(progress, windows)
    teacher = open_teacher(
        model, windows.ids, schedule.windows_used(windows), settings.temperature, work / TEACHER, say, threads
    )
    if not isinstance(teacher, LiveTeacher):
        del model  # one model in memory is enough
    student = load_model(start.path, device=device)
    parts = LearnableParts(student, start, norms=settings.train_norms, codes=settings.train_codes)
    recompute_if_large(student, schedule.batch * windows.ids.shape[1])  # the whole step, in as many threads as parts
    training = ScaleTraining(
        student, parts.parameters(), teacher, windows, schedule, parts.keep_codes_in_range, work / STATE, threads
    )
    result = training.run(progress)
    return parts.tensors(), result, sum(p.numel() for p in training.parameters.values())


def _schedule(settings: LearnSettings, windows: PaddedWindows) -> Schedule:
    from quantlab.calibration.scale_training import Schedule

    mean_length = windows.tokens(windows.training) / len(windows.training)
    return Schedule(
        steps=settings.steps,
        batch=max(1, round(settings.step_tokens / mean_length)),
        part_tokens=settings.window_tokens,
        learning_rates={"scales": settings.learning_rate, "norms": settings.norm_rate, "codes": settings.code_rate},
        temperature=settings.temperature,
        evaluate_every=max(1, settings.steps // EVALUATIONS),
        patience=settings.patience,
        save_seconds=settings.save_seconds,
        seed=settings.seed,
    )


def _teacher_progress(progress: Progress, windows: PaddedWindows) -> Callable[[int, int], None]:
    length = windows.ids.shape[1]
    return lambda done, total: progress(done * length, total * length, "reading the original's predictions")


def _identity(original: Checkpoint, start: Checkpoint, windows: PaddedWindows, settings: LearnSettings) -> str:
    """A hash of all that decides the result."""
    parts = [_decisive(settings), model_digest(original), model_digest(start)]
    hasher = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    hasher.update(windows.ids.tobytes())
    hasher.update(windows.lengths.tobytes())
    return hasher.hexdigest()


def _decisive(settings: LearnSettings) -> dict[str, Any]:
    """The settings that the result depends on."""
    return {key: value for key, value in asdict(settings).items() if key != "save_seconds"}


def _claim(work: Path, identity: str) -> None:
    """Note what the work folder's files belong to, or refuse those of another run."""
    work.mkdir(parents=True, exist_ok=True)
    note = work / RUN
    if not note.exists():
        for stale in (work / STATE, work / TEACHER):
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink(missing_ok=True)
        with atomic_file(note, replace=True) as path:
            path.write_text(identity, encoding="utf-8")
    elif note.read_text(encoding="utf-8") != identity:
        raise InputError(f"{work}: holds unfinished work of other models, samples or settings; delete the folder")


def _write(
    original: Checkpoint,
    start: Checkpoint,
    trained: dict[str, PackedTensor | torch.Tensor],
    provenance: dict[str, Any],
    out: Path,
    overwrite: bool,
) -> None:
    """The start with other tensors; what it says of its own making stays, under `after` its method."""
    from importlib.metadata import version

    from quantlab.formats import PackedTensor

    config = packed_config(start)
    made = config["quantization_config"]
    own = {"method": METHOD, "after": made.get("method"), METHOD: provenance, "quantlab_version": version("quantlab")}
    config["quantization_config"] = {**made, **own}
    calibration = start.sidecar("calibration")
    sidecars = {} if calibration is None else {"calibration": calibration}
    entries = [start.entry(name) for name in start.names]
    with open_writer(out, entries, config, companions=original, replace=overwrite, sidecars=sidecars) as writer:
        for name in start.names:
            tensor = trained.get(name)
            if tensor is None:
                writer.copy(name, start)
            elif isinstance(tensor, PackedTensor):
                writer.write_packed(name, tensor)
            else:
                writer.write(name, tensor)
