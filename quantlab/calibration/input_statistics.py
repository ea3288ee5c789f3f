"""The second moments of all linear layers' inputs in a model as it is, written to a statistics file.

`quantize --statistics-out` measures layers behind quantized ones; here nothing is quantized. One block at a time is in
memory, and activations go from block to block through files beside the destination.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from quantlab.calibration import collection
from quantlab.calibration.activations import ActivationFile
from quantlab.calibration.batches import batches_of
from quantlab.calibration.block_pass import BlockPass
from quantlab.calibration.calibrated import usable_threads
from quantlab.calibration.samples import CalibrationRequest, open_calibration
from quantlab.calibration.statistics_file import StatisticsFile, StatisticsParts
from quantlab.calibration.streamed_model import Activations, StreamedModel
from quantlab.calibration.vocabulary import embedding_rows, head_name
from quantlab.checkpoint import Checkpoint
from quantlab.checkpoint.checksums import model_digest
from quantlab.errors import InputError
from quantlab.quantization.workers import one_thread_each

MODEL_ITSELF = "the model itself"  # in the place of the quantizer that other files' statistics were taken for

Progress = Callable[[int, int, str], None]  # (blocks done, blocks in all, what is at hand)


def collect_statistics(
    checkpoint: Checkpoint,
    out: Path,
    *,
    request: CalibrationRequest | None = None,
    activations: Activations = "int8",
    threads: int | None = None,
    progress: Progress | None = None,
) -> StatisticsFile:
    """Measure the whole second moments of the inputs of every linear weight and of the head, and write them to `out`.

    Args:
        request: the calibration text; by default the one that quantlab brings along.
        activations: how linear layers multiply; "int8" takes a third of the time of "float".
        threads: the most to use, by default one a core; the bytes do not depend on it.

    Raises:
        InputError: see `samples.open_calibration`; a model whose activations are not finite; `out` exists.
    """
    if os.path.lexists(out):
        raise InputError(f"{out}: exists already; choose another name")
    samples = open_calibration(checkpoint, request or CalibrationRequest())
    batches = batches_of(samples.windows, samples.length)
    model = StreamedModel(checkpoint, torch.float32, activations)
    count = usable_threads(threads)

    def say(done: int, what: str) -> None:
        if progress is not None:
            progress(done, model.blocks + 1, what)

    with _work_folder(out) as work:
        parts = StatisticsParts(work / "statistics")

        def open_activations(block: int, *, create: bool = False) -> ActivationFile:
            return ActivationFile(work / f"activations-{block:04}", batches, model.width, model.dtype, create=create)

        say(0, "embedding")
        with open_activations(0, create=True) as hidden, one_thread_each():
            embedded = model.embed(batches, lambda ids: embedding_rows(checkpoint, ids))
            for number, states in enumerate(embedded):
                hidden.write(number, states)
        for index in range(model.blocks):
            say(index, f"block {index + 1} of {model.blocks}")
            model.load_block(index)
            with (
                open_activations(index) as hidden,
                open_activations(index + 1, create=True) as outputs,
                BlockPass(model, index, batches, hidden, count) as block,
            ):
                for group in collection.input_groups(model, index, hidden.read(0)):
                    parts.add(f"block-{index:04}", group, block.statistics(group[0], full=True))
                block.finish(outputs)
            model.release(model.block_names(index))
            (work / f"activations-{index:04}").unlink()
        say(model.blocks, "head")
        name = head_name(checkpoint)
        with open_activations(model.blocks) as hidden:
            parts.add("vocabulary", [name], collection.collect_head(model, name, batches, hidden, count, full=True))
        metadata = {
            "model": model_digest(checkpoint),
            "method": MODEL_ITSELF,
            "calibration": json.dumps(samples.record(), sort_keys=True),
        }
        parts.finish(out, metadata)
    return StatisticsFile(out)


@contextlib.contextmanager
def _work_folder(out: Path) -> Iterator[Path]:
    """A folder beside the destination that goes whatever happens."""
    folder = out.with_name(f".{out.name}.collecting")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written: {error.strerror}") from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
