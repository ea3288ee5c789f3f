"""`--method learned` from end to end: gptq into the work folder, then its scales are learned and written to OUT."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantlab.calibration.calibrated import CalibrationOptions
from quantlab.calibration.learned import LearnSettings, learn_scales
from quantlab.calibration.padded_windows import HELD_OUT_SHARE
from quantlab.calibration.samples import SAMPLES, CalibrationRequest, open_calibration
from quantlab.checkpoint import Checkpoint, open_checkpoint
from quantlab.checkpoint.checksums import model_digest
from quantlab.checkpoint.export import check_outside
from quantlab.errors import InputError

if TYPE_CHECKING:
    from quantlab.calibration.quantize import Progress, QuantizeReport

START = "start"


def quantize_learned(
    model: str | Path,
    out: Path,
    begin: Callable[[Path, CalibrationOptions], QuantizeReport],
    options: CalibrationOptions,
    settings: LearnSettings,
    deciding: dict[str, Any],
    *,
    replaceable: bool,
    discard: bool,
    threads: int,
    progress: Progress | None,
) -> QuantizeReport:
    """Quantize with `begin` into OUT.quantizing, learn the scales of that, and write `out`.

    Args:
        begin: quantizes `model` by gptq into the folder it is given.
        deciding: what else decides the output's bytes, as JSON values.
        replaceable: whether an existing `out` may be replaced.
        discard: whether unfinished work may be thrown away that is not to be resumed.
        threads: the most to use; the bytes do not depend on it.

    Raises:
        InputError: statistics instead of text, an `out` that exists, unfinished work of other options or that was not
            to be resumed, and what `begin` and `learn_scales` refuse.
    """
    from quantlab.calibration.work_folder import work_folder_of

    started = time.monotonic()
    if options.statistics is not None:
        raise InputError("--statistics: learned needs text for the model to read; give --calibration instead")
    if out.exists() and not replaceable:
        raise InputError(f"{out}: exists already; choose another name or pass --overwrite")
    original = open_checkpoint(model)
    check_outside(original, out)
    windows = _windows(original, options.request or CalibrationRequest(), settings)
    work = work_folder_of(out)
    request = asdict(options.request) if options.request is not None else None
    begun = {"model": model_digest(original), "calibration": str(request), "learning": asdict(settings), **deciding}
    _claim(work, begun, options.resume, discard)
    start, report_file = work / START, work / "start-report"
    unfinished = work_folder_of(start).is_dir()
    if not (start / "config.json").is_file():
        report = begin(start, replace(options, resume=unfinished))
        _remember(report, report_file)
    report = _remembered(report_file)
    learned = learn_scales(
        model,
        start,
        windows,
        out,
        work,
        settings,
        overwrite=replaceable,
        threads=threads,
        progress=_in_weights(original, progress),
    )
    errors = _relative_errors(original, open_checkpoint(out), threads)
    shutil.rmtree(work)
    said = f"learned: KL divergence on held-out windows {learned.start_divergence:.6f} -> {learned.best_divergence:.6f}"
    tensors = tuple(
        replace(t, relative_error=errors.get(t.name, t.relative_error), weighted_error=None) for t in report.tensors
    )
    notes = (*report.notes, said, *learned.notes)
    return replace(report, tensors=tensors, notes=notes, seconds=time.monotonic() - started)


def _windows(original: Checkpoint, request: CalibrationRequest, settings: LearnSettings) -> tuple[tuple[int, ...], ...]:
    """As much text as the steps read once, and what is held out, in windows of at most `window_tokens`; the text may
    have less.
    """
    asked = open_calibration(original, request).length
    length = min(asked, settings.window_tokens)
    read = settings.steps * settings.step_tokens * HELD_OUT_SHARE / (HELD_OUT_SHARE - 1)
    tokens = max((request.samples or SAMPLES) * asked, read)
    return open_calibration(original, replace(request, samples=math.ceil(tokens / length), length=length)).windows


def _claim(work: Path, options: dict[str, Any], resume: bool, discard: bool) -> None:
    from quantlab.checkpoint import unfinished

    begun = work.is_dir() and any(work.iterdir())
    work.mkdir(parents=True, exist_ok=True)
    unfinished.begin(work, options, begun=begun, resume=resume, discard=discard)


def _remember(report: QuantizeReport, file: Path) -> None:
    from quantlab.checkpoint.atomic import atomic_file

    with atomic_file(file, replace=True) as path:
        path.write_text(json.dumps(asdict(report)), encoding="utf-8")


def _remembered(file: Path) -> QuantizeReport:
    from quantlab.calibration.quantize import QuantizeReport, TensorReport
    from quantlab.checkpoint.json_file import read_json

    said = read_json(file)
    tensors = tuple(TensorReport(**{**t, "shape": tuple(t["shape"])}) for t in said["tensors"])
    return QuantizeReport(**{**said, "tensors": tensors, "notes": tuple(said["notes"])})


def _in_weights(original: Checkpoint, progress: Progress | None) -> Progress | None:
    """The same bar for both parts: learning counts tokens, the bar weights."""
    if progress is None:
        return None
    total = original.parameters
    return lambda done, tokens, note: progress(done * total // max(1, tokens), total, f"learning scales: {note}")


def _relative_errors(original: Checkpoint, written: Checkpoint, threads: int) -> dict[str, float]:
    """The Frobenius norm of each quantized tensor's error over that of its weights."""
    import torch

    from quantlab.quantization.workers import in_order

    def relative_error(name: str) -> float:
        weight = original.read(name, torch.float32)
        error = written.read_packed(name).dequantize() - weight
        norms = [float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) for tensor in (error, weight)]
        return norms[0] / norms[1] if norms[1] else 0.0

    names = [name for name in written.names if written.format(name) is not None]
    return dict(zip(names, in_order(relative_error, names, threads), strict=True))
