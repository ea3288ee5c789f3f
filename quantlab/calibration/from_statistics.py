"""Quantize with statistics that were saved earlier: tensor by tensor, the model does not run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from quantlab.calibration.statistics_file import StatisticsFile
from quantlab.calibration.vocabulary import quantize_tensor
from quantlab.calibration.work_folder import FinishedTensor, WorkFolder
from quantlab.checkpoint import Checkpoint
from quantlab.formats import BlockFormat

if TYPE_CHECKING:
    from quantlab.calibration.blockwise import CalibratedMethod, Progress


def quantize_by_file(
    checkpoint: Checkpoint,
    plan: Mapping[str, BlockFormat | None],
    method: CalibratedMethod,
    file: StatisticsFile,
    work: WorkFolder,
    progress: Progress | None,
) -> Iterator[FinishedTensor]:
    """All tensors that `plan` gives a format; each is a step of `work`.

    Raises:
        InputError: statistics that do not fit the tensors, or what `quantize_weight` refuses.
    """
    done = 0
    for number, name in enumerate(checkpoint.names):
        format, step = plan[name], f"tensor-{number:05}"
        if format is not None:
            if progress is not None:
                progress(done, checkpoint.parameters, name)
            if not work.is_done(step):
                work.save(step, [quantize_tensor(checkpoint, name, format, method, file.statistics(name))])
            yield from work.load(step)
        done += checkpoint.entry(name).elements
