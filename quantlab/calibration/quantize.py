"""Checkpoint in, quantized checkpoint out: one tensor in memory at a time."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quantlab.calibration import calibrated, learned
from quantlab.calibration.calibrated import Calibration, CalibrationOptions, usable_threads
from quantlab.checkpoint import Checkpoint, TensorEntry, open_checkpoint, open_writer
from quantlab.checkpoint.expected_shapes import check_shapes
from quantlab.checkpoint.export import check_outside
from quantlab.checkpoint.gguf_file import GgufFile
from quantlab.checkpoint.gguf_writer import GgufWriter
from quantlab.checkpoint.reader import read_json
from quantlab.checkpoint.tensors import DTYPE_BYTES, FLOAT_DTYPES
from quantlab.errors import InputError
from quantlab.formats import BlockFormat, PackedTensor, Recipe, format_named
from quantlab.formats.blocks import check_own_scales
from quantlab.formats.recipe import QUANT_METHOD
from quantlab.quantization.recipes import check_some_layer_fits, default_recipe, named_recipe
from quantlab.quantization.stored import round_stored

_FLOAT_WORDS = tuple(word.lower() for word in DTYPE_BYTES)
METHODS = ("rtn", *calibrated.METHODS, learned.METHOD)

Progress = Callable[[int, int, str], None]  # (weights done, weights in all, the tensor at hand)


@dataclass(frozen=True)
class TensorReport:
    """One written tensor. `relative_error` is 0 for a tensor that was copied, None in a dry run; `weighted_error` tells
    what a calibrated method lost of the layer's outputs (`QuantizedWeight`); `note` says why a tensor was copied, or
    quantized by another method, if one would have expected otherwise.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    relative_error: float | None
    note: str | None = None
    weighted_error: float | None = None


@dataclass(frozen=True)
class QuantizeReport:
    """`bytes` counts tensor data as OUT holds them; `bits_per_weight` is that over all parameters, unquantized ones
    included. `file_bytes` is the size of a GGUF file, header and padding included: None for a folder, and in a dry run
    of a method whose settings are known at its end only (`learned`, or one with a target).
    """

    parameters: int
    bytes: int
    bits_per_weight: float
    source_bytes: int
    seconds: float
    tensors: tuple[TensorReport, ...]
    notes: tuple[str, ...]
    file_bytes: int | None = None


def quantize_checkpoint(
    model: str | Path,
    out: str | Path,
    *,
    format: str = "q4_1",
    uniform: bool = False,
    recipe: str | None = None,
    method: str = "rtn",
    levels: int | None = None,
    calibration: CalibrationOptions | None = None,
    learning: learned.LearnSettings | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> QuantizeReport:
    """Quantize a float checkpoint into a Hugging Face folder of packed tensors, or into a GGUF file.

    What quantlab quantized earlier may be replaced without `overwrite`; anything else may not. Unfinished work of a
    calibrated method stays in `OUT.quantizing`, for `CalibrationOptions.resume`.

    Args:
        model: folder, GGUF file or hub id.
        out: folder to make, or GGUF file if it ends in `.gguf`.
        format: the linear weights' format.
        uniform: embedding and head take `format` too, instead of Q8_0.
        recipe: a preset or YAML file (`recipes.named_recipe`) that replaces `format` and `uniform`.
        method: how codes and scales are chosen: `rtn` rounds to nearest, `search` weighs columns by the layer's inputs,
            `gptq` feeds errors back and fits scales under their second moment, `learned` goes on from there and trains
            all scales together against the original's predictions.
        levels: how many of the format's codes blocks' linear weights may use: a stress test in the same bytes.
        calibration: what methods but `rtn` read; by default the text that quantlab brings along.
        learning: how `learned` trains.
        dry_run: report shapes, formats and sizes, and write nothing (errors are None then).
        threads: the most to use, by default one a core; the bytes do not depend on it.

    Raises:
        InputError: unknown format, method or recipe, an unreadable or already quantized model, a tensor with NaN,
            infinity or a scale beyond fp16, calibration text or statistics that are none or do not fit, unfinished work
            that was not to be resumed, an `out` that exists or is the model itself, a full disk.
    """
    started, out = time.monotonic(), Path(out)
    chosen = format_named(format)
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}; choose one of: {', '.join(METHODS)}")
    options = calibration or CalibrationOptions()
    if method == learned.METHOD and not dry_run:
        choice = {"format": format, "uniform": uniform, "recipe": recipe, "levels": levels}
        report = _quantize_learned(
            model, out, choice, options, learning or learned.LearnSettings(), overwrite, threads, progress
        )
        return replace(report, file_bytes=_file_bytes(out))
    settings_are_known = method != learned.METHOD
    method = method if settings_are_known else "gptq"
    options.check(method)
    checkpoint = open_checkpoint(model)
    if not all(checkpoint.stored_type(name) in _FLOAT_WORDS for name in checkpoint.names):
        raise InputError(f"{checkpoint.path}: is quantized already; start from the original model")
    rules = _recipe(checkpoint, chosen, uniform, recipe)
    check_outside(checkpoint, out)
    check_shapes(checkpoint)
    plan = {name: _planned_format(checkpoint, rules, name) for name in checkpoint.names}
    check_some_layer_fits(checkpoint, rules, plan)
    job = _Job(checkpoint, out, rules, plan, method, levels, threads, progress)
    check_method(method if settings_are_known else learned.METHOD, plan.values())
    for name, planned in plan.items():
        if planned is not None:
            _with_levels(job, name, planned)  # refuses before any work
    reports = [_report(checkpoint, rules, name, format) for name, format in plan.items()]
    notes: tuple[str, ...] = ()
    if dry_run:
        total, file_bytes = _bytes_to_be(job, options)
        file_bytes = file_bytes if settings_are_known else None
    else:
        replaceable = overwrite or is_own_output(out)
        if method in calibrated.METHODS:
            written, notes, total = _write_calibrated(job, options, replaceable, overwrite)
        else:
            written, notes, total = _write_rounded(job, replaceable)
        file_bytes = _file_bytes(out)
        reports = [written.get(report.name, replace(report, relative_error=0.0)) for report in reports]
    return QuantizeReport(
        parameters=checkpoint.parameters,
        bytes=total,
        bits_per_weight=8 * total / max(1, checkpoint.parameters),
        source_bytes=checkpoint.nbytes,
        seconds=time.monotonic() - started,
        tensors=tuple(reports),
        notes=notes,
        file_bytes=file_bytes,
    )


def _quantize_learned(
    model: str | Path,
    out: Path,
    choice: dict[str, Any],
    options: CalibrationOptions,
    settings: learned.LearnSettings,
    overwrite: bool,
    threads: int | None,
    progress: Progress | None,
) -> QuantizeReport:
    from quantlab.calibration.learned_run import quantize_learned

    # Refuses at once.
    quantize_checkpoint(model, out, method=learned.METHOD, calibration=options, dry_run=True, **choice)

    def begin(start: Path, from_there: CalibrationOptions) -> QuantizeReport:
        return quantize_checkpoint(
            model, start, method="gptq", calibration=from_there, threads=threads, progress=progress, **choice
        )

    run = {"calibration_dtype": options.dtype, "calibration_activations": options.activations}
    deciding = {**choice, **options.method_options, **run}
    return quantize_learned(
        model,
        out,
        begin,
        options,
        settings,
        deciding,
        replaceable=overwrite or is_own_output(out),
        discard=overwrite,
        threads=usable_threads(threads),
        progress=progress,
    )


def _recipe(checkpoint: Checkpoint, format: BlockFormat, uniform: bool, recipe: str | None) -> Recipe:
    if recipe is None:
        return default_recipe(checkpoint.family, format, uniform)
    if uniform:
        raise InputError("--uniform goes with --format; a recipe names the embedding's and head's formats itself")
    return named_recipe(recipe, checkpoint.family, checkpoint.names)


@dataclass(frozen=True)
class _Job:
    """One run: from which tensors to which formats, and how."""

    checkpoint: Checkpoint
    out: Path
    recipe: Recipe
    plan: dict[str, BlockFormat | None]
    method: str
    levels: int | None
    threads: int | None
    progress: Progress | None

    @property
    def entries(self) -> list[TensorEntry]:
        """What the output holds."""
        return [_planned_entry(self.checkpoint, name, format) for name, format in self.plan.items()]

    def config(self, more: dict[str, Any] | None = None) -> dict[str, Any]:
        """The model's config.json with the recipe, and how it was applied, as its quantization_config."""
        from importlib.metadata import version

        provenance = {"method": self.method, "quantlab_version": version("quantlab"), **(more or {})}
        if self.levels is not None:
            provenance["levels"] = self.levels
        tying = {"tie_word_embeddings": self.checkpoint.tied}
        return {**self.checkpoint.config, **tying, "quantization_config": {**self.recipe.to_config(), **provenance}}

    def report(self, name: str, error: float, note: str | None, weighted: float | None) -> TensorReport:
        """Of a tensor that was quantized."""
        format = self.plan[name]
        assert format is not None
        return TensorReport(name, self.checkpoint.shape(name), format.name, error, note, weighted)


def _file_bytes(out: Path) -> int | None:
    return out.stat().st_size if out.is_file() else None


def _bytes_to_be(job: _Job, options: CalibrationOptions) -> tuple[int, int | None]:
    """Of all tensors and, of a GGUF file, of the whole: its metadata tell what it was calibrated with."""
    if job.out.suffix != ".gguf":
        return sum(entry.nbytes for entry in job.entries), None
    config = job.config()
    sidecars: _Sidecars = {}
    if job.method in calibrated.METHODS:
        config, sidecars = _described(job, options, Calibration(job.checkpoint, job.method, options))
    writer = GgufWriter(job.out, job.entries, config, companions=job.checkpoint, sidecars=sidecars)
    file_bytes = writer.file_bytes
    return writer.tensor_bytes, file_bytes


def _described(job: _Job, options: CalibrationOptions, calibration: Calibration) -> tuple[dict[str, Any], _Sidecars]:
    """Configuration and sidecars of an output that was calibrated."""
    config = job.config({"calibration": calibration.provenance, **options.method_options})
    return config, {"calibration": calibration.sidecar}


_Sidecars = dict[str, dict[str, Any]]
_Written = tuple[dict[str, TensorReport], tuple[str, ...], int]  # by name; notes; bytes of all tensors


def _write_calibrated(job: _Job, options: CalibrationOptions, replaceable: bool, overwrite: bool) -> _Written:
    """With statistics of the layers' inputs. The writer opens first: what it refuses need not be computed."""
    import torch

    from quantlab.calibration.blockwise import CalibratedMethod
    from quantlab.calibration.work_folder import remove_work

    calibration = Calibration(job.checkpoint, job.method, options)
    method = CalibratedMethod(
        job.method,
        levels=job.levels,
        threads=usable_threads(job.threads),
        dtype=getattr(torch, options.dtype),
        activations=options.activations,  # type: ignore[arg-type]
        options=options.method_options,
        where=f"{job.checkpoint.path}: ",
    )
    config, sidecars = _described(job, options, calibration)
    reports: dict[str, TensorReport] = {}
    with open_writer(
        job.out, job.entries, config, companions=job.checkpoint, replace=replaceable, sidecars=sidecars
    ) as writer:
        with calibration.run(job.recipe, job.plan, method, job.out, overwrite, job.progress) as tensors:
            for done in tensors:
                writer.write_packed(done.name, PackedTensor(done.blocks, _format(job, done.name)))
                reports[done.name] = job.report(done.name, done.relative_error, done.note, done.weighted_error)
        for name, format in job.plan.items():
            if format is None:
                writer.copy(name, job.checkpoint)
    remove_work(job.out)
    return reports, (*calibration.notes, *writer.notes), writer.tensor_bytes


def _format(job: _Job, name: str) -> BlockFormat:
    format = job.plan[name]
    assert format is not None
    return format


def _write_rounded(job: _Job, replaceable: bool) -> _Written:
    """Rounded to nearest, without torch."""
    checkpoint, reports, done = job.checkpoint, {}, 0
    with (
        open_writer(job.out, job.entries, job.config(), companions=checkpoint, replace=replaceable) as writer,
        _write_behind() as write,
    ):
        for name, format in job.plan.items():
            if job.progress is not None:
                job.progress(done, checkpoint.parameters, name)
            if format is None:
                write(writer.copy, name, checkpoint)
            else:
                blocks, error = round_stored(checkpoint, name, _with_levels(job, name, format), job.threads)
                write(writer.write_bytes, name, blocks.reshape(-1), writer.entries[name])
                reports[name] = job.report(name, error, None, None)
            done += checkpoint.entry(name).elements
        if job.progress is not None:
            job.progress(done, checkpoint.parameters, "")
    return reports, tuple(writer.notes), writer.tensor_bytes


def _with_levels(job: _Job, name: str, format: BlockFormat) -> BlockFormat:
    vocabulary = (job.checkpoint.family.embedding, job.checkpoint.family.head)
    return format if name in vocabulary else format.with_levels(job.levels)


def check_method(method: str, formats: Iterable[BlockFormat | None]) -> None:
    """Refuse a method that chooses the scales of blocks where a format has one a tensor.

    Raises:
        InputError: it is one.
    """
    for format in formats:
        if format is not None and method != "rtn":
            check_own_scales(format, f"--method {method}", "use --method rtn, or train it (quantlab qat)")


def is_own_output(out: Path) -> bool:
    """Whether `out` is a folder or file that quantlab quantized earlier, which a new run may replace."""
    try:
        if out.is_file():
            return bool(GgufFile(out).metadata.get("quantlab.method"))
        if not (out / "config.json").is_file():
            return False
        quantization = read_json(out / "config.json").get("quantization_config")
    except InputError:
        return False
    return isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD


def _planned_format(checkpoint: Checkpoint, recipe: Recipe, name: str) -> BlockFormat | None:
    is_float = checkpoint.entry(name).dtype in FLOAT_DTYPES
    return recipe.format_for(name, checkpoint.shape(name)) if is_float else None


def _planned_entry(checkpoint: Checkpoint, name: str, format: BlockFormat | None) -> TensorEntry:
    if format is None:
        stored = checkpoint.entry(name)
        return TensorEntry(name, stored.dtype, stored.shape)
    rows, columns = checkpoint.shape(name)
    return TensorEntry(name, "U8", (rows, format.row_bytes(columns)))


def _report(checkpoint: Checkpoint, recipe: Recipe, name: str, format: BlockFormat | None) -> TensorReport:
    shape = checkpoint.shape(name)
    if format is not None:
        return TensorReport(name, shape, format.name, None)
    note, wanted = None, recipe.format_by_name(name)
    if wanted is not None:
        note = f"rows of {shape[-1]} are no multiple of {wanted.block_size}" if shape else "has no rows"
    return TensorReport(name, shape, checkpoint.entry(name).dtype.lower(), None, note)


@contextlib.contextmanager
def _write_behind() -> Iterator[Callable[..., None]]:
    """A function that calls a writer's method while the caller goes on to the next tensor, one at a time."""
    with ThreadPoolExecutor(1) as worker:
        pending: Future[None] | None = None

        def write(method: Callable[..., None], *arguments: Any) -> None:
            nonlocal pending
            if pending is not None:
                pending.result()
            pending = worker.submit(method, *arguments)

        yield write
        if pending is not None:
            pending.result()
