"""The quantizers that look at a layer's inputs: where their statistics come from, and what is kept of a broken run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantlab.calibration.samples import CalibrationRequest, CalibrationSamples, open_calibration
from quantlab.calibration.statistics_file import StatisticsFile, StatisticsParts
from quantlab.checkpoint import Checkpoint
from quantlab.checkpoint.checksums import model_digest
from quantlab.errors import InputError
from quantlab.formats import BlockFormat, Recipe

if TYPE_CHECKING:
    from quantlab.calibration.blockwise import CalibratedMethod, Progress
    from quantlab.calibration.work_folder import FinishedTensor, WorkFolder

METHODS = ("search", "gptq")
DTYPES = ("float32", "bfloat16")
ACTIVATIONS = ("int8", "float")


@dataclass(frozen=True)
class CalibrationOptions:
    """What a calibrated method may be told; see `quantize_checkpoint`."""

    request: CalibrationRequest | None = None
    statistics: Path | None = None
    statistics_out: Path | None = None
    resume: bool = False
    dtype: str = "float32"
    activations: str = "int8"
    method_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("statistics", "statistics_out"):
            if (path := getattr(self, name)) is not None:
                object.__setattr__(self, name, Path(path))  # a str does as well

    def check(self, method: str) -> None:
        """Refuse options that contradict each other or the method.

        Raises:
            InputError: they do.
        """
        if self.dtype not in DTYPES:
            raise InputError(f"--calibration-dtype {self.dtype}: choose one of: {', '.join(DTYPES)}")
        if self.activations not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise InputError(f"--calibration-activations {self.activations}: choose one of: {known}")
        if method not in METHODS:
            request = self.request if self.request is None or self.request.names_text else None
            given = {
                "--calibration": request, "--statistics": self.statistics, "--statistics-out": self.statistics_out,
                "--resume": self.resume or None,
            }  # fmt: skip
            for option, value in given.items():
                if value is not None:
                    raise InputError(f"{option}: method {method} uses none; choose --method {' or '.join(METHODS)}")
        if self.statistics is not None and (self.request is not None or self.statistics_out is not None):
            raise InputError("--statistics replaces --calibration and --statistics-out; give one or the other")


class Calibration:
    """Statistics for one run: of samples that go through the model, or of a file.

    Attributes:
        provenance: what the output's configuration says of them.
        sidecar: that, and the text's fingerprint where there is one.
        notes: what the user should know.
    """

    def __init__(self, checkpoint: Checkpoint, method: str, options: CalibrationOptions) -> None:
        self.checkpoint, self.options = checkpoint, options
        self.digest = model_digest(checkpoint)
        self.samples: CalibrationSamples | None = None
        self.file: StatisticsFile | None = None
        self.notes: list[str] = []
        if options.statistics is not None:
            self.file = StatisticsFile(options.statistics)
            self.file.check_model(self.digest, checkpoint.path)
            if method == "gptq" and not self.file.is_full:
                raise InputError(
                    f"{options.statistics}: holds parts of second moments, and gptq needs whole ones; collect with "
                    "--method gptq --statistics-out"
                )
            self.sidecar = {**self.file.calibration, "statistics_of": self.file.method}
        else:
            self.samples = open_calibration(checkpoint, options.request or CalibrationRequest())
            self.notes += self.samples.notes
            self.sidecar = self.samples.record()
        if options.statistics_out is not None and os.path.lexists(options.statistics_out):
            raise InputError(f"{options.statistics_out}: exists already; choose another name")
        self.provenance = {key: value for key, value in self.sidecar.items() if key != "fingerprint"}

    @contextlib.contextmanager
    def run(
        self,
        recipe: Recipe,
        plan: Mapping[str, BlockFormat | None],
        method: CalibratedMethod,
        out: Path,
        discard: bool,
        progress: Progress | None,
    ) -> Iterator[Iterator[FinishedTensor]]:
        """The quantized tensors, as they are finished and kept in OUT.quantizing; `discard` tells whether what is there
        may be thrown away if it is not to be resumed.

        Raises:
            InputError: see `work_folder.open_work` and `blockwise.BlockwiseQuantizer.run`.
        """
        from quantlab.calibration.work_folder import open_work

        deciding = self._deciding_options(recipe, method)
        with open_work(out, deciding, resume=self.options.resume, discard=discard, say=self.notes) as work:
            yield self._tensors(plan, method, work, progress)
            if self.options.statistics_out is not None:
                self._parts(work).finish(self.options.statistics_out, self._statistics_metadata(method))

    def _tensors(
        self,
        plan: Mapping[str, BlockFormat | None],
        method: CalibratedMethod,
        work: WorkFolder,
        progress: Progress | None,
    ) -> Iterator[FinishedTensor]:
        from quantlab.calibration.blockwise import BlockwiseQuantizer
        from quantlab.calibration.from_statistics import quantize_by_file

        if self.file is not None:
            return quantize_by_file(self.checkpoint, plan, method, self.file, work, progress)
        assert self.samples is not None
        parts = self._parts(work) if self.options.statistics_out is not None else None
        return BlockwiseQuantizer(self.checkpoint, plan, method, self.samples, work, parts, progress).run()

    def _parts(self, work: WorkFolder) -> StatisticsParts:
        return StatisticsParts(work.path / "statistics")

    def _statistics_metadata(self, method: CalibratedMethod) -> dict[str, str]:
        return {"model": self.digest, "method": method.name, "calibration": json.dumps(self.sidecar, sort_keys=True)}

    def _deciding_options(self, recipe: Recipe, method: CalibratedMethod) -> dict[str, Any]:
        """All that decides the output's bytes, and so whether unfinished work is of use."""
        from importlib.metadata import version

        return {
            "model": self.digest,
            "recipe": recipe.to_config()["rules"],
            "method": method.name,
            "method_options": {"levels": method.levels, **method.options},
            "original_beside": method.needs_drift,
            "calibration": self.provenance,
            "statistics": None if self.file is None else _file_digest(self.file.path),
            "statistics_out": self.options.statistics_out is not None,
            "calibration_dtype": self.options.dtype,
            "calibration_activations": self.options.activations,
            "quantlab_version": version("quantlab"),
        }


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def usable_threads(threads: int | None) -> int:
    """As many as asked for, or one for each core that this process may use."""
    if threads is not None:
        return threads
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
