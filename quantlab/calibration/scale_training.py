"""The training loop of learned scales: few numbers, a teacher's distribution, no labels.

A loop of our own and not transformers' Trainer: the state is some small tensors a layer, where the Trainer saves whole
models, and not atomically; the best state must be found by the divergence on held-out windows and the start counts as a
candidate; a resumed run must end with the same bytes, and so must one with another number of threads.

A step is a fixed list of parts, each some windows that one thread takes forward and backward alone; gradients are added
in the list's order. Held-out windows are divided alike.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from quantlab.calibration import heap
from quantlab.calibration.padded_windows import PaddedWindows
from quantlab.calibration.patience import is_given_up
from quantlab.calibration.teacher import Teacher
from quantlab.checkpoint.atomic import atomic_file
from quantlab.errors import InputError
from quantlab.quantization.workers import check_at_every_matrix, in_order, one_thread_each

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAM_BETAS = (0.9, 0.95)
WARM_UP_SHARE = 0.05  # of all steps
OUTLIER = 2.0  # a step's gradient is scaled down to this multiple of the usual norm
LOGITS_AT_ONCE = 1 << 24  # numbers: 64 MB in fp32, held about six times over

Progress = Callable[[int, int, str], None]  # (tokens done, tokens in all, the latest divergence)


@dataclass(frozen=True)
class Schedule:
    """`learning_rates` are Adam's at their highest, by kind of parameter; they rise over the first steps and fall to
    zero along a cosine. A step takes `batch` windows, in parts of at most `part_tokens` places, padding included, or
    one window. Every `evaluate_every` steps the held-out divergence is measured; after `patience` measurements in turn
    that were each no better than the one before, nor a new best, the run ends. The state is saved every `save_seconds`.
    """

    steps: int
    batch: int
    part_tokens: int
    learning_rates: Mapping[str, float]
    temperature: float
    evaluate_every: int
    patience: int
    save_seconds: float
    seed: int

    def windows(self, step: int, training: np.ndarray) -> np.ndarray:
        """Which of the windows with numbers `training` a step takes: an epoch visits all of them, in an order drawn
        from (seed, epoch).
        """
        places = np.arange(step * self.batch, (step + 1) * self.batch)
        epochs, within = places // len(training), places % len(training)
        orders = {e: np.random.default_rng([self.seed, int(e)]).permutation(training) for e in set(epochs)}
        return np.array([orders[e][i] for e, i in zip(epochs, within, strict=True)])

    def windows_used(self, windows: PaddedWindows) -> np.ndarray:
        """All windows that a run can ask its teacher for, each once, ascending."""
        steps = [self.windows(step, windows.training) for step in range(self.steps)]
        return np.unique(np.concatenate([*steps, windows.held_out]))


@dataclass(frozen=True)
class TrainingResult:
    """Divergences are nats per token of held-out windows, at temperature 1; `best_step` 0 is the start."""

    steps: int
    best_step: int
    start_divergence: float
    best_divergence: float
    history: tuple[tuple[int, float], ...]


def windows_in_a_part(student: PreTrainedModel, windows: PaddedWindows, part_tokens: int) -> int:
    """How many windows go through the model together: what is a thread's work, and so depends on no thread."""
    places = min(part_tokens, LOGITS_AT_ONCE // student.config.get_text_config().vocab_size)
    return max(1, places // windows.ids.shape[1])


class ScaleTraining:
    """Trains `parameters` of `student` towards `teacher`; see `run`.

    Args:
        parameters: by kind (a key of the schedule's learning rates), then by name.
        windows: those to train on, and those that decide which state is best.
        after_step: called after every step of the optimizer.
        state_file: where the state is kept, if the run is to survive a kill.
        threads: how many parts are computed at a time; no bit depends on it on a CPU.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        parameters: Mapping[str, Mapping[str, torch.nn.Parameter]],
        teacher: Teacher,
        windows: PaddedWindows,
        schedule: Schedule,
        after_step: Callable[[], None],
        state_file: Path | None = None,
        threads: int = 1,
    ) -> None:
        self.student, self.teacher, self.windows, self.schedule = student, teacher, windows, schedule
        self.after_step, self.state_file, self.threads = after_step, state_file, threads
        check_at_every_matrix(student)
        self.parameters = {f"{kind}:{name}": p for kind, group in parameters.items() for name, p in group.items()}
        groups = [
            {"params": list(group.values()), "lr": schedule.learning_rates[kind]} for kind, group in parameters.items()
        ]
        self.optimizer = torch.optim.Adam(groups, betas=ADAM_BETAS, eps=1e-16)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)
        self.step, self.best_step, self.usual_norm = 0, 0, 0.0
        self.history: list[tuple[int, float]] = []
        self.best: dict[str, torch.Tensor] = self._snapshot()

    @one_thread_each()  # the optimizer and the gradients' norms belong to the calling thread
    def run(self, progress: Progress | None = None) -> TrainingResult:
        """Train to the end or until nothing improves, and leave the student with the best state, the start included.

        Raises:
            InputError: the state file is damaged, or the divergence at the start is not finite.
        """
        schedule, windows = self.schedule, self.windows
        tokens = schedule.batch * windows.tokens(windows.training) // len(windows.training)  # of a step, on average
        if self.threads > 1:
            heap.share_heaps()
        self._restore()
        if not self.history:
            self._evaluate()
            if not math.isfinite(self.history[0][1]):
                raise InputError("the divergence of the quantized model on held-out windows is not finite; check it")
        saved, note = time.monotonic(), f"held out {self.history[-1][1]:.5f}"
        while self.step < schedule.steps and not is_given_up(self.history, self.best_step, schedule.patience):
            loss = self._train_step()
            if self.step % schedule.evaluate_every == 0 or self.step == schedule.steps:
                note = f"held out {self._evaluate():.5f}"
            if self.state_file is not None and time.monotonic() - saved > schedule.save_seconds:
                self._save(self.state_file)
                saved = time.monotonic()
            if progress is not None:
                progress(self.step * tokens, schedule.steps * tokens, f"KL divergence {loss:.5f}, {note}")
        if self.state_file is not None:
            self._save(self.state_file)  # what comes after may fail, on a full disk for example
        for name, parameter in self.parameters.items():
            parameter.data.copy_(self.best[name])
        by_step = dict(self.history)
        return TrainingResult(self.step, self.best_step, by_step[0], by_step[self.best_step], tuple(self.history))

    def _rate(self, step: int) -> float:
        warm_up = max(1, round(WARM_UP_SHARE * self.schedule.steps))
        share = (step - warm_up) / max(1, self.schedule.steps - warm_up)
        return (step + 1) / (warm_up + 1) if step < warm_up else 0.5 * (1 + math.cos(math.pi * min(1.0, share)))

    def _train_step(self) -> float:
        """One step of the optimizer; the mean divergence of its windows at the schedule's temperature, times its square
        (which makes gradients comparable between temperatures: Hinton, Vinyals, Dean 2015).
        """
        windows = self.schedule.windows(self.step, self.windows.training)
        temperature, total = self.schedule.temperature, 0.0
        weight = temperature**2 / self.windows.tokens(windows)
        parameters = list(self.parameters.values())

        def learn(part: np.ndarray) -> tuple[float, tuple[torch.Tensor | None, ...]]:
            """The loss of a part and its gradients, which go nowhere else: parts share the parameters."""
            loss = self._divergence(part, temperature) * weight
            return float(loss.detach()), torch.autograd.grad(loss, parameters, allow_unused=True)

        for loss, gradients in in_order(learn, self._parts(windows), self.threads):
            total += loss
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        if math.isfinite(total):  # windows that overflow train nothing
            self._clip_gradients()
            self.optimizer.step()
            self.after_step()
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()
        self.step += 1
        return total

    def _clip_gradients(self) -> None:
        """Adam undoes any constant factor, so only gradients out of proportion to the earlier ones do harm."""
        parameters = list(self.parameters.values())
        limit = OUTLIER * self.usual_norm if self.usual_norm else math.inf
        norm = min(float(torch.nn.utils.clip_grad_norm_(parameters, limit)), limit)
        self.usual_norm += (norm - self.usual_norm) / min(self.step + 1, 10)

    def _evaluate(self) -> float:
        @torch.no_grad()
        def measure(part: np.ndarray) -> float:
            return float(self._divergence(part, 1.0))

        total = sum(in_order(measure, self._parts(self.windows.held_out), self.threads))
        divergence = total / self.windows.tokens(self.windows.held_out)
        self.history.append((self.step, divergence))
        if divergence < dict(self.history)[self.best_step]:
            self.best_step, self.best = self.step, self._snapshot()
        return divergence

    def _divergence(self, windows: np.ndarray, temperature: float) -> torch.Tensor:
        """The sum over all tokens of some windows; a token sees no padding, for that comes after it."""
        device, lengths = self.student.device, self.windows.lengths[windows]
        length = int(lengths.max())
        ids = torch.from_numpy(self.windows.ids[windows, :length]).to(device)
        logits = self.student(input_ids=ids, use_cache=False).logits
        each = self.teacher.targets(windows, length).divergence(logits, temperature)
        counts = torch.arange(length, device=device) < torch.from_numpy(lengths).to(device)[:, None]
        return torch.where(counts, each, 0).sum()

    def _parts(self, windows: np.ndarray) -> list[np.ndarray]:
        size = windows_in_a_part(self.student, self.windows, self.schedule.part_tokens)
        return [windows[i : i + size] for i in range(0, len(windows), size)]

    def _snapshot(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    def _save(self, path: Path) -> None:
        state = {
            "step": self.step,
            "best_step": self.best_step,
            "usual_norm": self.usual_norm,
            "history": self.history,
            "best": self.best,
            "parameters": self._snapshot(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
        }
        with atomic_file(path, replace=True) as temporary:
            torch.save(state, temporary)

    def _restore(self) -> None:
        if self.state_file is None or not self.state_file.exists():
            return
        try:
            state: dict[str, Any] = torch.load(self.state_file, map_location=self.student.device, weights_only=True)
        except Exception as error:
            raise InputError(f"{self.state_file}: cannot be read ({error}); remove it and start again") from None
        for name, parameter in self.parameters.items():
            parameter.data.copy_(state["parameters"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.step, self.best_step, self.best = state["step"], state["best_step"], state["best"]
        self.usual_norm = state["usual_norm"]
        self.history = [(int(step), float(divergence)) for step, divergence in state["history"]]
