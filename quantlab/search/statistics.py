"""Second moments of the float model's layer inputs, block after block, into one file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quantlab.calibration import collection
from quantlab.calibration.activations import ActivationFile
from quantlab.calibration.batches import batches_of
from quantlab.calibration.block_pass import BlockPass
from quantlab.calibration.statistics_file import StatisticsFile, StatisticsParts
from quantlab.calibration.streamed_model import StreamedModel
from quantlab.calibration.vocabulary import embedding_rows, head_name
from quantlab.checkpoint import Checkpoint
from quantlab.quantization.workers import one_thread_each

Progress = Callable[[int, int, str], None]
METHOD = "float"  # predecessors are those of the float model


def float_statistics(
    checkpoint: Checkpoint,
    windows: tuple[tuple[int, ...], ...],
    folder: Path,
    digest: str,
    threads: int,
    progress: Progress,
) -> StatisticsFile:
    """The statistics of all linear layers on `windows`, from `folder` if an earlier run finished them there.

    Raises:
        InputError: inputs or weights that are NaN or infinite.
    """
    path = folder / "statistics.safetensors"
    if not path.is_file():
        work = folder / "collecting"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        parts = StatisticsParts(work / "parts")
        _collect(checkpoint, windows, work, parts, threads, progress)
        calibration: dict[str, Any] = {"tokens": sum(map(len, windows))}
        parts.finish(path, {"model": digest, "method": METHOD, "calibration": json.dumps(calibration)})
        shutil.rmtree(work)
    return StatisticsFile(path)


def _collect(
    checkpoint: Checkpoint,
    windows: tuple[tuple[int, ...], ...],
    work: Path,
    parts: StatisticsParts,
    threads: int,
    progress: Progress,
) -> None:
    model = StreamedModel(checkpoint)
    batches = batches_of(windows, max(map(len, windows)))

    def activations(block: int, *, create: bool = False) -> ActivationFile:
        return ActivationFile(work / f"activations-{block}", batches, model.width, model.dtype, create=create)

    with activations(0, create=True) as hidden, one_thread_each():
        for number, states in enumerate(model.embed(batches, lambda ids: embedding_rows(checkpoint, ids))):
            hidden.write(number, states)
    for index in range(model.blocks):
        progress(index, model.blocks + 1, f"block {index + 1} of {model.blocks}")
        model.load_block(index)
        with (
            activations(index) as hidden,
            activations(index + 1, create=True) as outputs,
            BlockPass(model, index, batches, hidden, threads) as block,
        ):
            for group in collection.input_groups(model, index, hidden.read(0)):
                parts.add(f"block-{index:04}", group, block.statistics(group[0], full=True))
            block.finish(outputs)
        model.release(model.block_names(index))
        hidden.path.unlink()
    progress(model.blocks, model.blocks + 1, "head")
    name = head_name(checkpoint)
    with activations(model.blocks) as hidden:
        parts.add("vocabulary", [name], collection.collect_head(model, name, batches, hidden, threads, full=True))
    progress(model.blocks + 1, model.blocks + 1, "")
