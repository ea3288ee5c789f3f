"""`quantlab merge --learn`: a merge's weights by gradient, from text, and proof on other text that they are better.

The loss of the merged model, quantized if the output is, goes down its gradient by the coefficients (Adam), from those
of the config. The state that is best on windows to choose by is compared with the start on windows of a third kind,
pair by pair; a gain whose 95 % interval includes zero is refused. What comes out is an ordinary config, and its merge.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path

from quantlab.calibration.calibrated import CalibrationOptions, usable_threads
from quantlab.checkpoint.atomic import check_destination
from quantlab.errors import InputError
from quantlab.merging.adapter_merge import merges_adapters
from quantlab.merging.config import MergeConfig, read_config
from quantlab.merging.gram_files import InputTexts
from quantlab.merging.job import MergeRequest
from quantlab.merging.memory import data_bytes, limit_of
from quantlab.merging.merge import merge_checkpoints
from quantlab.merging.packed_output import Packing
from quantlab.merging.report import MergeReport
from quantlab.merging.work import WorkPlaces
from quantlab.merging.work import work_folder_of as merge_folder_of
from quantlab.search.coefficient_training import CoefficientSettings
from quantlab.search.coefficients import check_learnable
from quantlab.search.learning_job import LearningJob
from quantlab.search.learning_report import LearnedMergeReport, LearningReport
from quantlab.search.learning_work import STATE, open_learning
from quantlab.search.request import Stage


def learn_merge(
    config: str | Path | MergeConfig,
    out: Path,
    text: Path,
    settings: CoefficientSettings | None = None,
    *,
    keep_unproven: bool = False,
    max_ram: int | str | None = None,
    format: str | None = None,
    uniform: bool = False,
    recipe: str | None = None,
    method: str | None = None,
    calibration: CalibrationOptions | None = None,
    report: Path | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    stage: Stage = lambda label, unit: nullcontext(_nothing),
) -> LearnedMergeReport:
    """Learn the weights of a `task_arithmetic` or `linear` merge, and merge with them.

    In memory are the model in fp32, the gradient of its largest tensor and the activations of some 1,000 tokens; of the
    merged models, rows at a time. Equal arguments give equal weights on one machine, if the number of threads is equal
    too. Unfinished work stays in `OUT.learning`, for `resume`.

    Args:
        config: as `merge_checkpoints` has it. A weighted average (`linear` with `normalize`) stays one; coefficients of
            `task_arithmetic` are free.
        out: folder to make, or GGUF file if it ends in `.gguf`.
        text: what the merge is to be good at: UTF-8, or `.jsonl` of "text" or "messages". A quarter of it (64 windows
            at most) is for the report alone, an eighth (16 at most) chooses the best state.
        keep_unproven: write the merge although its gain may be none, and say so in its config.
        max_ram: bounds merging, not learning.
        method: how the output is quantized; learning rounds to nearest, whatever it is.
        stage: opens the progress of one stage.

    Raises:
        InputError: another method; weights that differ within a group; too little text or memory; a gain that is
            unproven; whatever `merge_checkpoints` refuses.
    """
    started, chosen, notes = time.monotonic(), settings or CoefficientSettings(), list[str]()
    request = MergeRequest(
        config=_checked(config, chosen.by),
        out=out,
        packing=Packing(format, uniform, recipe, method, calibration),
        texts=InputTexts(),
        conflicts=None,
        limit=limit_of(max_ram),
        seed=chosen.seed,
        threads=usable_threads(threads),
        progress=None,
    )
    request.packing.check()
    before = data_bytes()
    job = LearningJob(request, text, chosen, stage)
    if dry_run:
        return _extended(job.merge.report({}, None, started), None, "", [job.summary()])
    check_destination(out, overwrite)
    _check_unfinished_merge(out, resume or overwrite)
    with open_learning(out, job.deciding_options(), resume=resume, discard=overwrite, say=notes) as folder:
        learning, values = job.learn(folder)
        if not learning.proven and not keep_unproven:
            (folder / STATE).unlink()  # nothing to go on with
            raise InputError(_refusal(learning, chosen))
        made = job.config_with(values, learning)
        limit = request.limit + max(0, data_bytes() - before)  # what learning has left is none of merging's
        with stage("merging", "weights") as progress:
            merged = merge_checkpoints(
                made,
                out,
                max_ram=limit,
                format=format,
                uniform=uniform,
                recipe=recipe,
                method=method,
                calibration=calibration,
                report=report,
                seed=chosen.seed,
                threads=threads,
                overwrite=overwrite,
                resume=resume and merge_folder_of(out).is_dir(),
                progress=progress,
            )
    seconds = time.monotonic() - started
    return replace(_extended(merged, learning, made.text, [*notes, *job.notes(learning)]), seconds=seconds)


def _nothing(done: int, total: int, note: str) -> None:
    pass


def _checked(config: str | Path | MergeConfig, grain: str) -> MergeConfig:
    parsed = config if isinstance(config, MergeConfig) else read_config(config)
    if merges_adapters(parsed):
        raise InputError(f"--learn: learns weights of whole models; {parsed.source} merges adapters")
    check_learnable(parsed, grain)
    return parsed


def _check_unfinished_merge(out: Path, is_settled: bool) -> None:
    """Learning takes long; what the merge after it would refuse is refused now."""
    folder = merge_folder_of(out)
    if WorkPlaces(folder).journal.is_file() and not is_settled:
        raise InputError(f"{folder}: holds unfinished work; pass --resume to go on with it, or delete the folder")


def _extended(
    merged: MergeReport, learning: LearningReport | None, config: str, notes: Sequence[str]
) -> LearnedMergeReport:
    own = {field.name: getattr(merged, field.name) for field in fields(MergeReport)}
    own["notes"] = (*notes, *merged.notes)
    return LearnedMergeReport(**own, learning=learning, config=config)


def _refusal(learning: LearningReport, settings: CoefficientSettings) -> str:
    if not learning.best_step:
        return (
            "--learn: unproven: no step was better than the config's weights on the windows to choose by; nothing was "
            "written; give more text, or --keep-unproven to merge with those weights"
        )
    coarser = "" if settings.by == "model" else " or a coarser --learn-by"
    return (
        f"--learn: unproven: {learning.summary}, which includes zero; nothing was written; give more text{coarser}, or "
        "--keep-unproven to have it all the same"
    )
