"""Every tensor in every format, as the chosen method quantizes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from quantlab.calibration.blockwise import CalibratedMethod
from quantlab.calibration.statistics_file import StatisticsFile
from quantlab.calibration.vocabulary import quantize_tensor
from quantlab.checkpoint import Checkpoint
from quantlab.checkpoint.tensors import FLOAT_DTYPES
from quantlab.formats import FORMATS, BlockFormat
from quantlab.quantization.recipes import default_recipe
from quantlab.quantization.stored import round_stored

CANDIDATES: tuple[BlockFormat, ...] = tuple(FORMATS[name] for name in ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0"))
FITTING = ("refit_rounds", "descent_sweeps")  # the method's options that concern one tensor
STAND_INS = {"learned": "gptq"}  # where a method trains the whole model, what it starts from stands for it


def choosable(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The tensors that get a format: linear weights, embedding and head, if their rows are whole blocks."""
    recipe = default_recipe(checkpoint.family, CANDIDATES[0], uniform=True)
    return tuple(
        name
        for name in checkpoint.names
        if checkpoint.entry(name).dtype in FLOAT_DTYPES and recipe.format_for(name, checkpoint.shape(name)) is not None
    )


@dataclass(frozen=True)
class Candidates:
    """What can be chosen from; `statistics` are the float model's, since all other tensors are float when one is
    measured.
    """

    checkpoint: Checkpoint
    statistics: StatisticsFile
    method: str
    options: Mapping[str, Any]
    threads: int

    def blocks(self, name: str, format: BlockFormat) -> np.ndarray:
        """The tensor in that format, uint8 [rows, row_bytes]."""
        if self.method == "rtn":
            return round_stored(self.checkpoint, name, format, self.threads)[0]
        method = STAND_INS.get(self.method, self.method)
        options = {k: v for k, v in self.options.items() if k in FITTING} if method == "gptq" else {}
        calibrated = CalibratedMethod(method, threads=self.threads, options=options)
        finished = quantize_tensor(self.checkpoint, name, format, calibrated, self.statistics.statistics(name))
        return finished.blocks.numpy()

    def error_share(self, name: str, format: BlockFormat) -> float:
        """tr(dW D dW^T) / tr(W D W^T), with D the mean squares of the layer's inputs and dW the error of the quickest
        method akin: the share of the outputs' energy that is lost. An embedding's columns weigh alike.
        """
        known = self.statistics.statistics(name)
        quick = CalibratedMethod("search" if self.method == "search" else "rtn", threads=self.threads)
        if known is not None:
            known = replace(known, second_moment=None)
        elif quick.name == "rtn":
            return round_stored(self.checkpoint, name, format, self.threads)[1] ** 2
        return quantize_tensor(self.checkpoint, name, format, quick, known).weighted_error
