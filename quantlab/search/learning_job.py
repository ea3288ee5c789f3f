"""Learn a merge's coefficients: all that can be checked first, then merge the start, train, and judge."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from quantlab.calibration import heap
from quantlab.calibration.recomputing import KEPT_ACTIVATIONS, activation_bytes, recompute_if_large
from quantlab.checkpoint import Checkpoint, open_checkpoint
from quantlab.divergence import mean_and_stderr
from quantlab.documents import read_bytes
from quantlab.errors import InputError
from quantlab.formats import BlockFormat
from quantlab.generation.memory import available_memory
from quantlab.merging.config import MergeConfig
from quantlab.merging.job import MergeJob, MergeRequest
from quantlab.merging.merge import merge_checkpoints
from quantlab.merging.plan import plan_merge
from quantlab.merging.plan_types import TensorPlan
from quantlab.search.coefficient_model import PART_TOKENS, MergedModel, learning_device
from quantlab.search.coefficient_training import CoefficientSettings, CoefficientTraining, Objective, Progress, State
from quantlab.search.coefficient_windows import Ids, LearningText, learning_text
from quantlab.search.coefficients import agrees, coefficients_of, learned_config
from quantlab.search.learning_report import LearnedCoefficient, LearningReport
from quantlab.search.learning_work import START, STATE
from quantlab.search.measuring import student_quantile
from quantlab.search.request import Stage
from quantlab.training.next_token_loss import LOGIT_BYTES

CONFIDENCE = 0.95  # of the interval that must not include zero
SPARE_BYTES = 256 << 20  # of learning, for all that is not counted


class LearningJob:
    """One request, checked; see `learn_merge`.

    Attributes:
        merge: the user's merge, planned and checked: what it refuses is refused before anything is learned.
    """

    def __init__(self, request: MergeRequest, text: Path, settings: CoefficientSettings, stage: Stage) -> None:
        self._request, self._text, self._settings, self._stage = request, text, settings, stage
        self._text_digest = hashlib.sha256(read_bytes(text)).hexdigest()
        self.merge = MergeJob(request)
        self._coefficients = coefficients_of(request.config, self.merge.plan, settings.by)
        self._companion = self.merge.sources[self.merge.plan.companions].checkpoint
        self._windows: LearningText | None = None
        if "tokenizer.json" not in self.merge.plan.files:  # else the merge has a tokenizer that is not there yet
            self._windows = self._read_text(self._companion)
        check_learning_memory(self.merge.tensors, self.merge.formats, self._companion.config)

    def _read_text(self, checkpoint: Checkpoint) -> LearningText:
        settings = self._settings
        return learning_text(checkpoint, self._text, settings.seed, settings.steps * settings.step_tokens)

    def deciding_options(self) -> dict[str, Any]:
        """All that decides what is learned."""
        options = {key: value for key, value in self.merge.options.items() if key != "output"}
        own = {"settings": asdict(self._settings), "learned from": self._text_digest}
        return {**options, **own, "threads": self._request.threads}

    def summary(self) -> str:
        """What would be learned, for a dry run."""
        groups, models = self._coefficients.start.shape
        read = "" if self._windows is None else f" of {self._windows.counts()['training']} tokens"
        return (
            f"--learn: {groups * models} weights would be learned ({groups} x {models}, by {self._settings.by}){read}"
        )

    def learn(self, folder: Path) -> tuple[LearningReport, np.ndarray]:
        """Learn in a work folder: what is reported, and the coefficients to write, float64 [groups, models]."""
        from quantlab.loading import load_model

        started, start = time.monotonic(), folder / START
        if not start.is_dir():
            with self._stage("merging the start", "weights") as progress:
                merge_checkpoints(
                    self._request.config,
                    start,
                    max_ram=self._request.limit,
                    seed=self._request.seed,
                    threads=self._request.threads,
                    overwrite=True,
                    progress=progress,
                )
        windows = self._windows or self._read_text(open_checkpoint(start))
        with torch_threads(self._request.threads):
            model = load_model(start, device=learning_device())
            recompute_if_large(model, max(PART_TOKENS, windows.length))
            with MergedModel(
                model, self.merge.tensors, self.merge.sources, self._coefficients, self.merge.formats
            ) as objective:
                if not objective.learnable.any():
                    raise InputError(f"--learn: the models of {self._request.config.source} are all equal")
                found = self._found(objective, windows, folder, started)
        del model, objective
        gc.collect()
        heap.give_back()
        return found

    def _found(
        self, objective: MergedModel, windows: LearningText, folder: Path, started: float
    ) -> tuple[LearningReport, np.ndarray]:
        training = CoefficientTraining(
            objective, self._coefficients, objective.learnable, windows, self._settings, folder / STATE
        )
        with self._stage("learning", "tokens") as progress:
            state = training.run(progress)
        with self._stage("judging", "tokens") as progress:
            losses = compared(objective, self._coefficients.start, state.best, windows.report, progress)
        return self._reported(state, losses, windows, training.tokens_a_step, started), state.best

    def _reported(
        self,
        state: State,
        losses: tuple[list[np.ndarray], list[np.ndarray]],
        windows: LearningText,
        tokens_a_step: int,
        started: float,
    ) -> LearningReport:
        before, after = losses
        gain, stderr = mean_and_stderr([one - other for one, other in zip(before, after, strict=True)])
        margin = student_quantile((1 + CONFIDENCE) / 2, len(before) - 1) * stderr
        counts = windows.counts()
        return LearningReport(
            by=self._settings.by,
            steps=state.step,
            best_step=state.best_step,
            start_loss=mean_and_stderr(before)[0],
            learned_loss=mean_and_stderr(after)[0],
            gain=gain,
            gain_stderr=stderr,
            gain_low=gain - margin,
            gain_high=gain + margin,
            proven=gain - margin > 0,
            report_windows=len(before),
            training_tokens=counts["training"],
            selection_tokens=counts["selection"],
            report_tokens=counts["report"],
            trained_tokens=state.step * tokens_a_step,
            evaluated_tokens=len(state.history) * counts["selection"] + 2 * counts["report"],
            history=state.history,
            coefficients=tuple(self._rows(state.best)),
            seconds=time.monotonic() - started,
        )

    def _rows(self, values: np.ndarray) -> Iterator[LearnedCoefficient]:
        coefficients = self._coefficients
        for number, group in enumerate(coefficients.groups):
            for column, model in enumerate(coefficients.models):
                start, learned = (float(array[number, column]) for array in (coefficients.start, values))
                yield LearnedCoefficient(model, group.name, start, learned)

    def config_with(self, values: np.ndarray, learning: LearningReport) -> MergeConfig:
        """The user's config with learned weights; it plans to exactly these."""
        unproven = "" if learning.proven else "\nunproven: the interval includes zero, or nothing was learned"
        remark = f"weights learned by quantlab, by {learning.by}, {learning.steps} steps\n{learning.summary}{unproven}"
        made = learned_config(self._request.config, self._coefficients, values, remark)
        assert agrees(plan_merge(made, self.merge.sources), self._coefficients, values)
        return made

    def notes(self, learning: LearningReport) -> list[str]:
        """What the user should know of the result."""
        notes = []
        if not learning.proven:
            notes.append(f"unproven: {learning.summary}; it is written because --keep-unproven was given")
        if self.merge.formats and self._request.packing.chosen_method != "rtn":
            method = self._request.packing.chosen_method
            notes.append(f"gains are those of the merge rounded to nearest; the output is quantized by {method}")
        return notes


def compared(
    objective: Objective, start: np.ndarray, learned: np.ndarray, windows: Sequence[Ids], progress: Progress
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The losses of each window's tokens with two sets of coefficients.

    Raises:
        InputError: one is NaN or infinite.
    """
    found: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    total, done = 2 * sum(map(len, windows)), 0
    for values, losses in zip((start, learned), found, strict=True):
        objective.take(values)
        for window in windows:
            losses.append(objective.losses(window))
            if not np.isfinite(losses[-1]).all():
                raise InputError("--learn: the merge's loss is NaN or infinite; check the models")
            done += len(window)
            progress(done, total, "")
    return found


def check_learning_memory(
    tensors: Sequence[TensorPlan], formats: Mapping[str, BlockFormat], config: Mapping[str, Any]
) -> None:
    """Refuse to learn where memory is too little: systems kill without a word.

    Raises:
        InputError: more is needed than is available.
    """
    needed, available = learning_bytes(tensors, formats, config), available_memory()
    if available is not None and needed > available:
        raise InputError(
            f"--learn: needs {needed / 1e9:.3g} GB of memory (the model in float32, one gradient, activations), and "
            f"{available / 1e9:.3g} GB are available; learn on a machine with more"
        )


def learning_bytes(tensors: Sequence[TensorPlan], formats: Mapping[str, BlockFormat], config: Mapping[str, Any]) -> int:
    """What learning takes beside the program: the model in fp32, packed blocks, the largest tensor's gradient (three
    times, for a head that is computed in chunks), activations of one pass, and the logits of a chunk.
    """
    sizes = [math.prod(tensor.shape) for tensor in tensors]
    shapes = [(formats[tensor.name], tensor.shape) for tensor in tensors if tensor.name in formats]
    packed = sum(shape[0] * format.row_bytes(shape[1]) for format, shape in shapes)
    activations = min(KEPT_ACTIVATIONS, activation_bytes(config, PART_TOKENS))
    return 4 * sum(sizes) + packed + 12 * max(sizes, default=0) + activations + 4 * LOGIT_BYTES + SPARE_BYTES


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch compute with so many threads meanwhile."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
