"""A packed output: the merge in float first, then quantized as any model is, then put together with what was packed.

Tensors that all inputs have packed alike, in the format that the output has too, keep their bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from quantlab.calibration import calibrated, learned
from quantlab.calibration.calibrated import CalibrationOptions
from quantlab.calibration.quantize import METHODS, Progress, QuantizeReport, check_method, quantize_checkpoint
from quantlab.calibration.work_folder import work_folder_of
from quantlab.checkpoint import Checkpoint, CheckpointWriter
from quantlab.checkpoint.families import Family
from quantlab.checkpoint.tensors import FLOAT_DTYPES
from quantlab.errors import InputError
from quantlab.formats import BlockFormat, Recipe, format_named
from quantlab.merging.plan_types import MergePlan, TensorPlan
from quantlab.merging.tensor_merge import MergedTensor
from quantlab.quantization.recipes import default_recipe, named_recipe

UNUSED_FORMAT = "q8_0"  # where a recipe replaces it


@dataclass(frozen=True)
class Packing:
    """What a packed output is to be: see `calibration.quantize.quantize_checkpoint`.

    Attributes:
        format, uniform, recipe: which tensor gets which format.
        method: how codes and scales are chosen; None: `gptq` where there is calibration text, else `rtn`.
        calibration: what methods but `rtn` read.
    """

    format: str | None = None
    uniform: bool = False
    recipe: str | None = None
    method: str | None = None
    calibration: CalibrationOptions | None = None

    @property
    def is_wanted(self) -> bool:
        """Whether the output is packed at all."""
        return self.format is not None or self.recipe is not None

    @property
    def chosen_method(self) -> str:
        """The best that there is input for."""
        if self.method is not None:
            return self.method
        return "rtn" if self.calibration is None else "gptq"

    def check(self, *, reads_text: bool = False) -> None:
        """Refuse options that go with nothing.

        Args:
            reads_text: whether merging itself reads the calibration text.

        Raises:
            InputError: a format and a recipe, an unknown method, options of packing for a float output.
        """
        if not self.is_wanted:
            text = None if reads_text else self.calibration
            given = {"--method": self.method, "--calibration": text, "--uniform": self.uniform or None}
            for option, value in given.items():
                if value is not None:
                    raise InputError(f"{option}: the output is float; give --format or --recipe to have it quantized")
            return
        if self.format is not None and self.recipe is not None:
            raise InputError("--recipe replaces --format; give one or the other")
        if self.recipe is not None and self.uniform:
            raise InputError("--uniform goes with --format; a recipe names the embedding's and head's formats itself")
        if self.chosen_method not in METHODS:
            raise InputError(f"unknown method {self.method!r}; choose one of: {', '.join(METHODS)}")
        if self.calibration is not None:
            self.calibration.check("gptq" if self.chosen_method == learned.METHOD else self.chosen_method)

    def formats(self, plan: MergePlan, rules: Recipe, family: Family) -> dict[str, BlockFormat]:
        """The format of each tensor that is packed.

        Raises:
            InputError: a method that a format does not go with, or no layer has rows of whole blocks.
        """
        weights = [tensor for tensor in plan.tensors if tensor.dtype in FLOAT_DTYPES]
        found = {tensor.name: rules.format_for(tensor.name, tensor.shape) for tensor in weights}
        layers = [name for name in found if name not in (family.embedding, family.head)]
        wanted = {name: format for name in layers if (format := rules.format_by_name(name)) is not None}
        check_method(self.chosen_method, [*found.values(), *wanted.values()])
        if wanted and all(found[name] is None for name in wanted):
            name, format = next(iter(wanted.items()))
            raise InputError(
                f"no layer can be packed: {name} and {len(wanted) - 1} more have no rows of a multiple of "
                f"{format.block_size} ({format.name}); choose another format"
            )
        return {name: format for name, format in found.items() if format is not None}

    def rules(self, plan: MergePlan, family: Family) -> Recipe:
        """Which tensor gets which format.

        Raises:
            InputError: an unknown format or recipe.
        """
        if self.recipe is not None:
            return named_recipe(self.recipe, family, [tensor.name for tensor in plan.tensors])
        assert self.format is not None
        return default_recipe(family, format_named(self.format), self.uniform)


def in_float(tensors: Sequence[TensorPlan], formats: Mapping[str, BlockFormat]) -> tuple[TensorPlan, ...]:
    """The plans of the float model that is quantized: what will be packed is not rounded twice."""
    return tuple(replace(plan, dtype="F32") if plan.name in formats else plan for plan in tensors)


def quantize_merged(
    model: Path, out: Path, packing: Packing, threads: int | None, progress: Progress | None
) -> QuantizeReport:
    """Quantize the float merge; what an interrupted run of a calibrated method left is gone on with."""
    options, method = packing.calibration or CalibrationOptions(), packing.chosen_method
    if method in (*calibrated.METHODS, learned.METHOD) and any(work_folder_of(out).glob("*.safetensors")):
        options = replace(options, resume=True)
    return quantize_checkpoint(
        model,
        out,
        format=packing.format or UNUSED_FORMAT,
        uniform=packing.uniform,
        recipe=packing.recipe,
        method=method,
        calibration=options,
        overwrite=True,
        threads=threads,
        progress=progress,
    )


def write_packed(writer: CheckpointWriter, packed: Checkpoint, kept: Mapping[str, tuple[Checkpoint, str]]) -> None:
    """Write the quantized model's tensors, but for those that are `kept`: their bytes come from (checkpoint, name)."""
    for name in packed.names:
        source, its_name = kept.get(name, (packed, name))
        if len(source.entry(its_name).shape) < 2:
            writer.copy(name, source)
            continue
        with writer.pieces(name) as write:
            for _, rows in source.read_rows(its_name):
                write(rows.reshape(-1))


def relative_errors(
    report: QuantizeReport, kept: Mapping[str, tuple[Checkpoint, str]], formats: Mapping[str, BlockFormat]
) -> dict[str, float]:
    """By packed tensor: the norm of what packing changed over that of the merged weights."""
    return {
        tensor.name: 0.0 if tensor.name in kept else tensor.relative_error or 0.0
        for tensor in report.tensors
        if tensor.name in formats
    }


def whole_error(errors: Mapping[str, float], merged: Mapping[str, MergedTensor]) -> float:
    """The same over all packed tensors together."""
    total = sum(merged[name].squares for name in errors)
    changed = sum(error**2 * merged[name].squares for name, error in errors.items())
    return math.sqrt(changed / total) if total else 0.0
