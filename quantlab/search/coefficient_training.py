"""Adam on a merge's coefficients: some numbers in float64, kept in a file from which a killed run goes on."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from quantlab.calibration.patience import is_given_up
from quantlab.checkpoint.atomic import atomic_file
from quantlab.checkpoint.json_file import read_json
from quantlab.errors import InputError
from quantlab.search.coefficient_windows import Ids, LearningText
from quantlab.search.coefficients import DECIMALS, GRAINS, Coefficients

BETAS, EPSILON = (0.9, 0.95), 1e-12
WARM_UP_SHARE = 0.05  # of all steps
SAVE_SECONDS = 30.0

Progress = Callable[[int, int, str], None]  # (tokens done, tokens in all, the latest losses)


@dataclass(frozen=True)
class CoefficientSettings:
    """How coefficients are learned.

    A step reads about `step_tokens` and moves a coefficient by about `learning_rate` at the most; rates rise over the
    first steps and fall to zero along a cosine. The loss on windows to choose by is measured `evaluations` times beside
    the start, and learning ends after `patience` in turn that were each no better than the one before. `by` is the
    grain: one coefficient of each model for the whole "model", for each "layer" (embeddings and output apart) or each
    "tensor".
    """

    by: str = "layer"
    steps: int = 40
    step_tokens: int = 1024
    learning_rate: float = 0.05
    evaluations: int = 4
    patience: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.by not in GRAINS:
            raise InputError(f"--learn-by {self.by}: choose one of: {', '.join(GRAINS)}")
        if self.steps < 1:
            raise InputError(f"--learn-steps {self.steps}: at least 1 is needed")
        for name in ("step_tokens", "evaluations", "patience"):
            if getattr(self, name) < 1:
                raise InputError(f"learning: {name} is {getattr(self, name)}; at least 1 is needed")
        if not 0 < self.learning_rate < math.inf:
            raise InputError(f"learning: learning_rate is {self.learning_rate}; it must be positive and finite")


class Objective(Protocol):
    """A model whose weights follow from coefficients; `coefficient_model.MergedModel` is one."""

    def take(self, values: np.ndarray) -> None:
        """Have the weights that these coefficients give, [groups, models]."""

    def gradient(self, windows: Sequence[Ids]) -> tuple[float, np.ndarray]:
        """The mean loss of some windows in nats per token, and its gradient by the coefficients."""

    def losses(self, window: Ids) -> np.ndarray:
        """The loss of each predicted token of a window, float64."""


@dataclass(frozen=True)
class State:
    """Where learning stands: coefficients, Adam's moments, the best so far, and (step, loss) of every measurement."""

    step: int
    values: np.ndarray
    first: np.ndarray
    second: np.ndarray
    best_step: int
    best: np.ndarray
    history: tuple[tuple[int, float], ...]


class CoefficientTraining:
    """Learns coefficients; see `run`.

    Args:
        learnable: which groups have anything to learn, bool [groups]; the others stay at the start.
        file: where the state is kept, if the run is to survive a kill.
    """

    def __init__(
        self,
        objective: Objective,
        coefficients: Coefficients,
        learnable: np.ndarray,
        text: LearningText,
        settings: CoefficientSettings,
        file: Path | None = None,
    ) -> None:
        self._objective, self._coefficients, self._learnable = objective, coefficients, learnable
        self._text, self._settings, self._file = text, settings, file
        self._batch = windows_a_step(text, settings)
        self.tokens_a_step = self._batch * sum(map(len, text.training)) // len(text.training)  # of a step, on average
        self._every = max(1, settings.steps // settings.evaluations)
        zeros, start = np.zeros_like(coefficients.start), coefficients.start
        self.state = State(0, start, zeros, zeros, 0, start, ())

    def run(self, progress: Progress | None = None) -> State:
        """Learn to the end, or until nothing improves; `best` of the result is the best state, the start included.

        Raises:
            InputError: the state file is damaged, or the loss at the start is not finite.
        """
        settings, saved = self._settings, time.monotonic()
        self._restore()
        try:
            self._objective.take(self.state.values)
            while True:
                if self._is_due():
                    self._evaluate()
                given_up = is_given_up(self.state.history, self.state.best_step, settings.patience)
                if self.state.step >= settings.steps or given_up:
                    return self.state
                loss = self._step()
                if time.monotonic() - saved > SAVE_SECONDS:
                    self._save()
                    saved = time.monotonic()
                if progress is not None:
                    note = f"loss {loss:.4f}, held out {self.state.history[-1][1]:.4f}"
                    progress(self.state.step * self.tokens_a_step, settings.steps * self.tokens_a_step, note)
        finally:  # a state is whole at any moment, and takes no time to write
            self._save()

    def _is_due(self) -> bool:
        """Whether a measurement is to be made now that has not been made."""
        step = self.state.step
        return (step % self._every == 0 or step == self._settings.steps) and step not in dict(self.state.history)

    def _step(self) -> float:
        state = self.state
        loss, found = self._objective.gradient(self._windows(state.step))
        step = state.step + 1
        if not (math.isfinite(loss) and bool(np.isfinite(found).all())):  # windows that overflow teach nothing
            self.state = replace(state, step=step)
            return loss
        gradient = self._coefficients.gradient(found) * self._learnable[:, None]
        first = BETAS[0] * state.first + (1 - BETAS[0]) * gradient
        second = BETAS[1] * state.second + (1 - BETAS[1]) * gradient**2
        change = first / (1 - BETAS[0] ** step) / (np.sqrt(second / (1 - BETAS[1] ** step)) + EPSILON)
        values = state.values - self._rate(state.step) * self._coefficients.gradient(change)
        self._objective.take(values)
        self.state = replace(state, step=step, values=values, first=first, second=second)
        return loss

    def _rate(self, step: int) -> float:
        steps = self._settings.steps
        warm_up = max(1, round(WARM_UP_SHARE * steps))
        share = (step - warm_up) / max(1, steps - warm_up)
        shape = (step + 1) / (warm_up + 1) if step < warm_up else 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
        return self._settings.learning_rate * shape

    def _windows(self, step: int) -> list[Ids]:
        """An epoch visits all windows, in an order drawn from (seed, epoch)."""
        windows, chosen = self._text.training, []
        for place in range(step * self._batch, (step + 1) * self._batch):
            epoch, within = divmod(place, len(windows))
            order = np.random.default_rng([self._settings.seed, epoch]).permutation(len(windows))
            chosen.append(windows[order[within]])
        return chosen

    def _evaluate(self) -> None:
        """The loss on the windows to choose by, of the coefficients as they will be written."""
        state, rounded = self.state, rounded_to_write(self.state.values, self._coefficients.start)
        self._objective.take(rounded)
        found = [self._objective.losses(window) for window in self._text.selection]
        loss = sum(float(each.sum()) for each in found) / sum(map(len, found))
        if not state.history and not math.isfinite(loss):
            raise InputError("--learn: the loss of the merge at the start is not finite; check the models")
        self._objective.take(state.values)
        is_best = not state.history or loss < dict(state.history)[state.best_step]
        if is_best:
            state = replace(state, best_step=state.step, best=rounded)
        kept = min(loss, sys.float_info.max) if not math.isnan(loss) else sys.float_info.max  # JSON has no others
        self.state = replace(state, history=(*state.history, (state.step, kept)))

    def _save(self) -> None:
        if self._file is None or not self.state.history:
            return
        plain = {key: _plain(value) for key, value in vars(self.state).items()}
        with atomic_file(self._file, replace=True) as path:
            path.write_text(json.dumps(plain), encoding="utf-8")

    def _restore(self) -> None:
        if self._file is None or not self._file.exists():
            return
        try:
            found = read_json(self._file)
            arrays = {key: np.array(found[key], np.float64) for key in ("values", "first", "second", "best")}
            if any(array.shape != self._coefficients.start.shape for array in arrays.values()):
                raise ValueError
            history = tuple((int(step), float(loss)) for step, loss in found["history"])
            self.state = State(int(found["step"]), best_step=int(found["best_step"]), history=history, **arrays)
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{self._file}: is damaged; delete it and start again") from None


def windows_a_step(text: LearningText, settings: CoefficientSettings) -> int:
    """How many windows hold a step's tokens on average."""
    mean_length = sum(map(len, text.training)) / len(text.training)
    return max(1, round(settings.step_tokens / mean_length))


def rounded_to_write(values: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Coefficients with as many decimals as a config has; those that are where they started stay."""
    return np.where(values == start, start, values.round(DECIMALS))


def _plain(value: object) -> object:
    return value.tolist() if isinstance(value, np.ndarray) else value
