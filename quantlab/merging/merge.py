"""Checkpoints in, merged checkpoint out, within a memory limit."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from quantlab.calibration.calibrated import CalibrationOptions
from quantlab.checkpoint.atomic import check_destination
from quantlab.errors import InputError
from quantlab.merging.adapter_merge import merge_adapters_of, merges_adapters
from quantlab.merging.config import MergeConfig, read_config
from quantlab.merging.conflict_files import ConflictFiles
from quantlab.merging.gram_files import InputTexts, uses_grams
from quantlab.merging.job import MergeJob, MergeRequest
from quantlab.merging.memory import limit_of
from quantlab.merging.packed_output import Packing
from quantlab.merging.report import MergeReport
from quantlab.merging.streaming import Progress
from quantlab.merging.work import WorkPlaces, open_work
from quantlab.native import default_threads


def merge_checkpoints(
    config: str | Path | MergeConfig,
    out: str | Path,
    *,
    max_ram: int | str | None = None,
    format: str | None = None,
    uniform: bool = False,
    recipe: str | None = None,
    method: str | None = None,
    calibration: CalibrationOptions | None = None,
    statistics: Mapping[str, str | Path] | None = None,
    rank: int | None = None,
    report: str | Path | None = None,
    seed: int = 0,
    threads: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Merge models as a config says: float or packed folders, GGUF files, hub ids, adapters on any of them.

    Deltas are taken in fp32 whatever the files hold. Tensors that are equal in all inputs are copied byte for byte,
    where the method keeps equal inputs. Unfinished work stays in `OUT.merging`, for `resume`. Models that are adapters
    alone are merged to an adapter.

    Args:
        config: mergekit's YAML words: a file, the text, or what `read_config` gives.
        out: folder to make, or GGUF file if it ends in `.gguf`.
        max_ram: bytes of data (heap, anonymous mappings, stacks) that the process may have while it merges, or a text
            such as "2GB"; by default 2 GB, or 1 GB beyond what the process holds already. Quantizing afterwards takes
            what it takes.
        format: quantize the merge: the linear weights' format. By default the output is float.
        uniform: embedding and head take `format` too, instead of Q8_0.
        recipe: a preset or YAML file that replaces `format` and `uniform`.
        method: how the output's codes and scales are chosen, as `quantize_checkpoint` has it; by default `gptq` with
            `calibration`, else `rtn`.
        calibration: what methods but `rtn` read; its text also tells merge methods that weigh by the layers' inputs
            (regmean) what those are, for models without `statistics`.
        statistics: for such methods, by model (its name in the config, or the last part of it): a statistics file, or a
            text to collect them with.
        rank: of a merged adapter; see `adapter_merge`.
        report: folder for a conflict report, `conflicts.json` and `conflicts.png`.
        seed: of methods that draw.
        threads: the most to use, by default one a core; the bytes do not depend on it, nor on `max_ram`.
        dry_run: check everything, and write nothing.
        resume: go on with what an interrupted run left.
        progress: called with weights gone over, weights to go over, and the tensor at hand.

    Raises:
        InputError: a config, model, adapter or option that is wrong, models that do not go together (all reasons are
            listed), a memory limit below what the largest tensor needs, unfinished work that was not to be resumed, an
            `out` that exists or is one of the models, a full disk.
    """
    started, out = time.monotonic(), Path(out)
    packing = Packing(format, uniform, recipe, method, calibration)
    parsed = config if isinstance(config, MergeConfig) else read_config(config)
    packing.check(reads_text=uses_grams(parsed.method))
    if merges_adapters(parsed):
        if packing.is_wanted or report is not None or statistics:
            raise InputError(f"{parsed.source}: merges adapters, which are not quantized, and have no conflict report")
        return merge_adapters_of(parsed, out, rank=rank, seed=seed, overwrite=overwrite, dry_run=dry_run)
    if rank is not None:
        raise InputError(f"--rank {rank}: is for merging adapters; these are whole models")
    text = calibration.request.text if calibration is not None and calibration.request is not None else None
    job = MergeJob(
        MergeRequest(
            config=parsed,
            out=out,
            packing=packing,
            texts=InputTexts({name: Path(file) for name, file in (statistics or {}).items()}, text, seed),
            conflicts=None if report is None else ConflictFiles(Path(report)),
            limit=limit_of(max_ram),
            seed=seed,
            threads=default_threads() if threads is None else threads,
            progress=progress,
        )
    )
    if dry_run:
        return job.report({}, None, started)
    check_destination(out, overwrite)
    notes: list[str] = []
    with open_work(out, job.options, job.packing_options, resume=resume, discard=overwrite, say=notes) as folder:
        merged, errors = job.run(WorkPlaces(folder), overwrite)
    return job.report(merged, errors, started, notes)
