"""Second moments of the layers' inputs for the methods that use them, by model: from files, or collected from text."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from quantlab.calibration.samples import CalibrationRequest
from quantlab.errors import InputError
from quantlab.merging.grams import MergeGrams, Progress, open_grams
from quantlab.merging.methods.table import METHODS
from quantlab.merging.plan_types import TensorPlan
from quantlab.merging.references import ModelReference
from quantlab.merging.sources import MergeSource

STATISTICS = ".safetensors"  # the suffix of a file of statistics; others are text


@dataclass(frozen=True)
class InputTexts:
    """What tells how each model's layers are used.

    Attributes:
        by_model: a statistics file or a text, by the model's name in the config or its last part.
        others: the text for models that are not named; None: the text that quantlab brings along.
        seed: draws windows from texts.
    """

    by_model: Mapping[str, Path] = field(default_factory=dict)
    others: Path | None = None
    seed: int = 0

    def check(self, method: str, models: Sequence[ModelReference]) -> dict[ModelReference, Path]:
        """The files by model.

        Raises:
            InputError: the method uses none, a name that no model or several have, a file that is not there.
        """
        if self.by_model and not uses_grams(method):
            raise InputError(f"--statistics: {method} reads no layer inputs; leave it out")
        found: dict[ModelReference, Path] = {}
        for name, file in self.by_model.items():
            named = [model for model in models if name in (str(model), model.model)]
            named = named or [model for model in models if Path(model.model).name == name]
            if len(named) != 1:
                known = ", ".join(map(str, models))
                raise InputError(f"--statistics {name}=...: names {len(named)} of the merged models; they are: {known}")
            if not file.is_file():
                raise InputError(f"--statistics {name}={file}: no such file; give statistics (.safetensors) or a text")
            found[named[0]] = file
        return found


def uses_grams(method: str) -> bool:
    """Whether a method wants second moments of the inputs."""
    return "grams" in inspect.signature(METHODS[method].merge).parameters


def merged_models(tensors: Sequence[TensorPlan]) -> list[ModelReference]:
    """The models whose weights are merged, in order."""
    return list(dict.fromkeys(part.model for plan in tensors for part in plan.parts))


def gather_grams(
    method: str,
    tensors: Sequence[TensorPlan],
    sources: Mapping[ModelReference, MergeSource],
    texts: InputTexts,
    folder: Path,
    *,
    threads: int,
    progress: Progress | None,
) -> MergeGrams | None:
    """Open or collect every merged model's statistics; None where the method uses none.

    Args:
        folder: where collected ones are kept.

    Raises:
        InputError: see `InputTexts.check` and `grams.open_grams`; a model with an adapter on it.
    """
    models = merged_models(tensors)
    given = texts.check(method, models)
    if not uses_grams(method):
        return None
    found = {}
    for number, model in enumerate(models):
        source, file = sources[model], given.get(model, texts.others)
        if source.adapter is not None:
            raise InputError(f"{model}: {method} reads the layers' inputs of whole models; fuse the adapter first")
        is_collected = file is not None and file.suffix == STATISTICS
        found[model] = open_grams(
            source.checkpoint,
            statistics=file if is_collected else None,
            request=None if is_collected else CalibrationRequest(text=file, seed=texts.seed),
            collect_to=folder / f"statistics-{number}{STATISTICS}",
            threads=threads,
            progress=progress,
        )
    return MergeGrams(found)
