"""What RegMean knows of the models' inputs: a statistics file for each, of which one matrix is in memory at a time.

The Gram matrices are the second moments that quantization calibrates with, so a file that `quantize --method gptq
--statistics-out` wrote serves here, as long as it is of the very model that is merged, and the other way round.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, overload

from quantlab.calibration.samples import CalibrationRequest
from quantlab.calibration.statistics_file import StatisticsFile
from quantlab.calibration.vocabulary import TIED_IDENTITY, head_name
from quantlab.checkpoint import Checkpoint
from quantlab.checkpoint.checksums import model_digest
from quantlab.errors import InputError

if TYPE_CHECKING:
    import torch

    from quantlab.merging.plan_types import TensorPlan
    from quantlab.merging.references import ModelReference

Progress = Callable[[int, int, str], None]


class ModelGrams:
    """The second moments of one model's inputs by weight, read when they are asked for.

    Raises:
        InputError: statistics of another model, or of parts of the second moments.
    """

    def __init__(self, checkpoint: Checkpoint, file: StatisticsFile) -> None:
        file.check_model(model_digest(checkpoint), checkpoint.path)
        if not file.is_full:
            raise InputError(
                f"{file.path}: holds parts of second moments, and regmean needs whole ones; collect with --method gptq "
                "--statistics-out, or leave the file out"
            )
        self.checkpoint, self.file = checkpoint, file

    def gram(self, name: str) -> torch.Tensor | None:
        """The mean of x x^T over the inputs x of weight `name`, float32 [in, in]; None for what is no linear weight.

        A tied matrix is the embedding too: the identity is added, as heavy as the head's inputs, as in quantizing it.
        """
        import torch

        found = self.file.statistics(name)
        if found is None or found.second_moment is None:
            return None
        rows, columns = self.checkpoint.shape(name)
        found.check(rows, columns, f"{self.file.path}: {name}")
        if not self.checkpoint.tied or name != head_name(self.checkpoint):
            return found.second_moment
        share = float(found.diagonal.mean(dtype=torch.float64)) * TIED_IDENTITY
        return found.second_moment + share * torch.eye(found.columns)


class TensorGrams(Sequence["torch.Tensor | None"]):
    """Those of one tensor of the output, for each merged model; asking for one reads it."""

    def __init__(self, parts: Sequence[tuple[ModelGrams | None, str]]) -> None:
        self._parts = tuple(parts)

    def __len__(self) -> int:
        return len(self._parts)

    @overload
    def __getitem__(self, index: int) -> torch.Tensor | None: ...
    @overload
    def __getitem__(self, index: slice) -> TensorGrams: ...
    def __getitem__(self, index: int | slice) -> torch.Tensor | TensorGrams | None:
        if isinstance(index, slice):
            return TensorGrams(self._parts[index])
        grams, name = self._parts[index]
        return None if grams is None else grams.gram(name)


class MergeGrams:
    """Those of all models of a merge; a merge asks `of` for each tensor that it plans."""

    def __init__(self, models: Mapping[ModelReference, ModelGrams]) -> None:
        self._models = dict(models)

    def of(self, plan: TensorPlan) -> TensorGrams:
        """Of a tensor's inputs, in the order of its parts; None for a model without statistics or such inputs."""
        return TensorGrams([(self._models.get(part.model), part.name) for part in plan.parts])


def open_grams(
    checkpoint: Checkpoint,
    *,
    statistics: Path | None = None,
    request: CalibrationRequest | None = None,
    collect_to: Path | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> ModelGrams:
    """Open a model's statistics, or collect them first.

    Args:
        statistics: a file that was collected earlier.
        request: the calibration text, where there is no file; each model should read text of its own task.
        collect_to: where to write what is collected; a file that is there already is taken, if it is of this model.

    Raises:
        InputError: neither a file nor a place to collect to; see `ModelGrams` and `collect_statistics`.
    """
    if statistics is not None:
        return ModelGrams(checkpoint, StatisticsFile(statistics))
    if collect_to is None:
        raise InputError(f"{checkpoint.path}: regmean needs the statistics of its layers' inputs; give a file")
    if collect_to.is_file():
        return ModelGrams(checkpoint, StatisticsFile(collect_to))
    from quantlab.calibration.input_statistics import collect_statistics

    return ModelGrams(
        checkpoint, collect_statistics(checkpoint, collect_to, request=request, threads=threads, progress=progress)
    )
