"""A request for a size or a divergence: what can be reached, which text measures, what decides the figures."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from quantlab.calibration.calibrated import CalibrationOptions
from quantlab.calibration.learned import LearnSettings
from quantlab.calibration.samples import CalibrationRequest, open_calibration
from quantlab.checkpoint import Checkpoint
from quantlab.checkpoint.checksums import model_digest
from quantlab.errors import InputError
from quantlab.search.budget import Budget
from quantlab.search.candidates import CANDIDATES, choosable
from quantlab.search.windows import MeasuringText, measuring_text

Progress = Callable[[int, int, str], None]
Stage = Callable[[str, str], AbstractContextManager[Progress]]  # (label, unit) -> the progress of one stage


@dataclass(frozen=True)
class TargetRequest:
    """What was asked for, and what follows from it before anything is measured."""

    checkpoint: Checkpoint
    out: Path
    method: str
    options: CalibrationOptions
    request: CalibrationRequest
    threads: int | None
    stage: Stage
    plan: Path | None
    most_measurements: int | None
    learning: LearnSettings | None

    @cached_property
    def budget(self) -> Budget:
        """The sizes of all choices."""
        names = choosable(self.checkpoint)
        if not names:
            raise InputError(f"{self.checkpoint.path}: has no matrix whose rows are whole blocks of 32")
        return Budget(self.checkpoint, names, self.out)

    def check_reachable(self, target_bpw: float | None) -> None:
        """Refuse a size that no mix has."""
        if target_bpw is None:
            return
        ends = {}
        for word, choose in (("smallest", min), ("largest", max)):
            format = choose(CANDIDATES, key=lambda f: f.bits_per_weight)
            ends[word] = self.budget.bytes_of(dict.fromkeys(self.budget.names, format)), format.name
        target = self.budget.bytes_at(target_bpw)
        if target < ends["smallest"][0]:
            least = math.ceil(1e4 * self.budget.bits_per_weight(ends["smallest"][0])) / 1e4
            raise InputError(
                f"--target-bpw {target_bpw:g}: the least possible is {least:g} bits per weight (all "
                f"{ends['smallest'][1]}; what is never quantized counts too)"
            )
        if target > ends["largest"][0]:
            most = math.floor(1e4 * self.budget.bits_per_weight(ends["largest"][0])) / 1e4
            raise InputError(
                f"--target-bpw {target_bpw:g}: the most that can be used is {most:g} bits per weight (all "
                f"{ends['largest'][1]})"
            )

    @cached_property
    def text(self) -> MeasuringText:
        """The windows to measure on."""
        return measuring_text(self.checkpoint, self.request, self.method != "rtn")

    @cached_property
    def digest(self) -> str:
        """Of the model."""
        return model_digest(self.checkpoint)

    def deciding_options(self) -> dict[str, Any]:
        """All that decides the figures."""
        from importlib.metadata import version

        calibration = self.text.calibration
        return {
            "model": self.digest,
            "method": self.method,
            "method options": dict(self.options.method_options),
            "training": repr(self.learning) if self.method == "learned" else None,
            "calibration": calibration and open_calibration(self.checkpoint, calibration).digest(),
            "windows": _digest_of(self.text.sensitivity, self.text.held_out),
            "version": version("quantlab"),
        }

    @property
    def quantize_options(self) -> CalibrationOptions:
        """With the request that leaves the windows alone."""
        return replace(self.options, request=self.text.calibration)


def _digest_of(*groups: tuple[tuple[int, ...], ...]) -> str:
    return hashlib.sha256(repr(groups).encode()).hexdigest()[:16]
