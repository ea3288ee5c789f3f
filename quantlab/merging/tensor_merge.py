"""Merge one tensor part by part: survey it where its method asks for that, merge, round, write rows as they come."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from quantlab.checkpoint.tensors import FLOAT_DTYPES, all_finite, torch_dtype
from quantlab.checkpoint.writer import CheckpointWriter
from quantlab.errors import InputError
from quantlab.merging.memory import TensorWork
from quantlab.merging.methods.method import Survey, merge_part, survey_for
from quantlab.merging.methods.noise import Noise
from quantlab.merging.methods.table import METHODS
from quantlab.merging.part_stream import Bounds, PartStream, parts_of
from quantlab.merging.plan_types import Part, TensorPlan
from quantlab.merging.readers import MatchedReader, Reader, ZeroReader
from quantlab.merging.references import ModelReference
from quantlab.merging.row_filling import fill_rows
from quantlab.merging.sources import MergeSource

# The least magnitude that rounds to infinity.
OVERFLOW = {"F16": 65520.0, "BF16": 3.3961775292304957e38, "F32": math.inf, "F64": math.inf}

Weights = tuple[torch.Tensor | None, list[torch.Tensor]]  # of the base and of the models
Observe = Callable[[TensorPlan, torch.Tensor | None, Sequence[torch.Tensor]], None]


class WrongWeightsError(InputError):
    """Weights that no output can hold: what was merged before is of no use, as the same would come of it again."""


class StoppedError(Exception):
    """The merge was told to stop between two parts."""


@dataclass(frozen=True)
class MergedTensor:
    """What became of a tensor.

    Attributes:
        how: "merged", or "copied" where all inputs are equal and the method keeps that.
        squares: the sum of the squares of its weights, 0 where that was not asked for.
    """

    name: str
    how: str
    squares: float


class TensorMerger:
    """Merges tensors of one plan; different threads may merge different tensors.

    Args:
        sources: the opened models.
        seed: of methods that draw.
        measure: sum the squares of merged weights.
        grams: of a tensor, per model its second moments [in, in] or None.
        observe: is shown every part of the inputs, fp32.
        advance: is told of weights that have been gone over: how many, and of which tensor.
    """

    def __init__(
        self,
        sources: Mapping[ModelReference, MergeSource],
        *,
        seed: int,
        measure: bool,
        grams: Callable[[TensorPlan], Sequence[torch.Tensor | None]] | None,
        observe: Observe | None,
        advance: Callable[[int, str], None],
    ) -> None:
        self._sources, self._seed, self._grams, self._observe = sources, seed, grams, observe
        self._measure, self._advance = measure, advance
        self._stop = threading.Event()

    def stop(self) -> None:
        """Let every thread end at its next part, with `StoppedError`."""
        self._stop.set()

    def passes(self, plan: TensorPlan) -> int:
        """How often the tensor's weights are gone over, surveys of all tensors together not counted."""
        survey = self._own_survey(plan)
        return 1 + (0 if survey is None else survey.passes)

    def survey(self, work: TensorWork, survey: Survey, reading: ThreadPoolExecutor) -> None:
        """Show a tensor to a survey over several."""
        for _, (base, tensors) in self._weights(work, reading):
            survey.add(base, tensors)

    def show(self, work: TensorWork, reading: ThreadPoolExecutor) -> None:
        """Show a tensor to the observer."""
        for _, (base, tensors) in self._weights(work, reading):
            if self._observe is not None:
                self._observe(work.plan, base, tensors)

    def merge(
        self, work: TensorWork, writer: CheckpointWriter, reading: ThreadPoolExecutor, surveyed: Any = None
    ) -> MergedTensor:
        """Merge a tensor and write it.

        Args:
            surveyed: the result of a survey over several tensors, where the method asks for one.

        Raises:
            InputError: a merged weight is NaN, infinite or beyond the output's element type.
            StoppedError: `stop` was called.
        """
        plan = work.plan
        if self.is_copied(plan):
            self._advance((self.passes(plan) - 1) * math.prod(plan.shape), plan.name)
            return self._copy(work, writer, reading)
        method = METHODS[plan.method]
        if (survey := self._own_survey(plan)) is not None:
            for _ in range(survey.passes):
                for _, (base, tensors) in self._weights(work, reading):
                    survey.add(base, tensors)
                survey.end_pass()
            surveyed = survey.result()
        noise, columns, squares = Noise(self._seed, plan.name), math.prod(plan.shape[1:]), 0.0
        grams = self._grams(plan) if self._grams is not None else None
        with writer.pieces(plan.name) as write:
            for (first, _), (base, tensors) in self._weights(work, reading):
                if self._observe is not None:
                    self._observe(plan, base, tensors)
                merged = merge_part(
                    method,
                    base,
                    tensors,
                    plan.parameters,
                    survey=surveyed,
                    offset=first * columns,
                    noise=noise,
                    grams=grams,
                )
                if self._measure:
                    squares += _squares(merged)
                write(rounded_bytes(merged, plan))
        return MergedTensor(plan.name, "merged", squares)

    def is_copied(self, plan: TensorPlan) -> bool:
        """Whether all inputs have the same bytes, and the method leaves equal inputs as they are."""
        method, models = METHODS[plan.method], _inputs(plan)
        if plan.overrides or not all(_is_whole(part, self._sources) for part in models):
            return False
        first = models[0]
        source = self._sources[first.model]
        if source.is_float(first.name) and not method.keeps_equal(plan.parameters):
            return False
        return all(source.raw_equal(first.name, self._sources[part.model], part.name) for part in models[1:])

    def _own_survey(self, plan: TensorPlan) -> Survey | None:
        method = METHODS[plan.method]
        if method.survey is None or method.scope(plan.parameters) != "tensor":
            return None
        return survey_for(method, plan.parameters, len(plan.parts))

    def _copy(self, work: TensorWork, writer: CheckpointWriter, reading: ThreadPoolExecutor) -> MergedTensor:
        plan, part = work.plan, _inputs(work.plan)[0]
        source, squares = self._sources[part.model], 0.0
        stored = source.checkpoint.entry(part.name).dtype
        is_kept = stored == plan.dtype and not source.is_adapted(part.name)
        is_kept = is_kept and not (self._measure and source.is_float(part.name))
        with writer.pieces(plan.name) as write:
            if not is_kept or self._observe is not None:
                for _, (base, tensors) in self._weights(work, reading):
                    if self._observe is not None:
                        self._observe(plan, base, tensors)
                    if not is_kept:
                        squares += _squares(tensors[0]) if self._measure else 0.0
                        write(rounded_bytes(tensors[0], plan))
            if is_kept:
                for raw in self._raw_parts(work, source, part.name):
                    if stored in FLOAT_DTYPES and not all_finite(raw, stored):
                        raise WrongWeightsError(
                            f"{source.checkpoint.path}: {part.name}: holds NaN or infinity; damaged"
                        )
                    write(raw)
        return MergedTensor(plan.name, "copied", squares)

    def _raw_parts(self, work: TensorWork, source: MergeSource, name: str) -> Iterator[np.ndarray]:
        reader, rows = source.reader(name), source.reader(name).rows
        buffer = np.empty(min(work.rows_a_part, rows) * reader.row_bytes, np.uint8)
        for first, last in parts_of(rows, work.rows_a_part):
            self._check_stop()
            raw = buffer[: (last - first) * reader.row_bytes]
            reader.fetch(first, last, raw)
            yield raw
            self._advance((last - first) * math.prod(work.plan.shape[1:]), name)

    def _weights(self, work: TensorWork, reading: ThreadPoolExecutor) -> Iterator[tuple[Bounds, Weights]]:
        """(rows, weights of base and models): one pass over the tensor."""
        plan = work.plan
        shape = plan.shape or (1,)
        inputs = (*plan.parts, *([plan.base] if plan.base is not None else []))
        stream = PartStream([self._reader(part) for part in inputs], shape, work.rows_a_part, reading)
        columns, count = math.prod(shape[1:]), len(plan.parts)
        needs_filling = bool(plan.overrides) or any(part.rows is not None for part in inputs)
        for (first, last), found in stream:
            self._check_stop()
            tensors, base = found[:count], found[count] if plan.base is not None else None
            if needs_filling:
                fill_rows(plan, first, base, tensors, self._row)
            yield (first, last), (base, tensors)
            self._advance((last - first) * columns, plan.name)

    def _reader(self, part: Part) -> Reader:
        if part.zeros:
            return ZeroReader()
        reader = self._sources[part.model].reader(part.name)
        return reader if part.rows is None else MatchedReader(reader, part.rows)

    def _row(self, part: Part, row: int) -> torch.Tensor:
        return self._sources[part.model].rows(part.name, row, row + 1)[0]

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise StoppedError


def _inputs(plan: TensorPlan) -> list[Part]:
    """The models' tensors and the base's where the method uses it."""
    is_used = plan.base is not None and METHODS[plan.method].base != "unused"
    return [*plan.parts, *([plan.base] if is_used and plan.base is not None else [])]


def _is_whole(part: Part, sources: Mapping[ModelReference, MergeSource]) -> bool:
    """Whether a part is a tensor as its file has it."""
    if part.zeros:
        return False
    return part.rows is None or part.rows == tuple(range(sources[part.model].shape(part.name)[0]))


def _squares(weights: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(weights, dtype=torch.float64)) ** 2


def rounded_bytes(weights: torch.Tensor, plan: TensorPlan) -> np.ndarray:
    """The bytes of merged weights in the output's element type, uint8 [nbytes].

    Raises:
        WrongWeightsError: a weight is NaN, infinite or beyond the type.
    """
    if weights.numel():
        low, high = (float(end) for end in weights.aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise WrongWeightsError(
                f"{plan.name}: the merged weights hold NaN or infinity; a model is damaged, or the parameters are wrong"
            )
        if max(-low, high) >= OVERFLOW[plan.dtype]:
            raise WrongWeightsError(f"{plan.name}: merged weights are beyond {plan.dtype}; set out_dtype to float32")
    stored = weights.to(torch_dtype(plan.dtype)).contiguous().reshape(-1)
    return stored.view(torch.uint8).numpy() if stored.numel() else np.empty(0, np.uint8)
