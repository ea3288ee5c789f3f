"""What learning a merge's coefficients reports."""

from __future__ import annotations

from dataclasses import dataclass

from quantlab.merging.report import MergeReport


@dataclass(frozen=True)
class LearnedCoefficient:
    """How much one model counts in one group of tensors, before and after."""

    model: str
    group: str
    start: float
    learned: float


@dataclass(frozen=True)
class LearningReport:
    """What was learned, and what it is worth.

    Losses are nats per token. `start_loss`, `learned_loss` and `gain` (start less learned) are those of the windows to
    report on, which decided nothing; `gain_stderr` has windows as sampling units, `gain_low` and `gain_high` bound the
    95 % interval, by Student's t. They are losses of the model in memory: quantized by rounding where the output is
    quantized.

    Attributes:
        by: "model", "layer" or "tensor".
        best_step: of the written state; 0 is the start.
        proven: whether the interval lies above zero.
        history: (step, loss on the windows to choose by).
        trained_tokens: that went forward and backward; `evaluated_tokens` only went forward.
    """

    by: str
    steps: int
    best_step: int
    start_loss: float
    learned_loss: float
    gain: float
    gain_stderr: float
    gain_low: float
    gain_high: float
    proven: bool
    report_windows: int
    training_tokens: int
    selection_tokens: int
    report_tokens: int
    trained_tokens: int
    evaluated_tokens: int
    history: tuple[tuple[int, float], ...]
    coefficients: tuple[LearnedCoefficient, ...]
    seconds: float

    @property
    def summary(self) -> str:
        """The gain in words."""
        return (
            f"{self.gain:.5f} nats per token better than the weights of the config on {self.report_windows} other "
            f"windows, 95 % interval {self.gain_low:.5f} to {self.gain_high:.5f}"
        )


@dataclass(frozen=True)
class LearnedMergeReport(MergeReport):
    """Also what was learned (None in a dry run), and the config with it."""

    learning: LearningReport | None = None
    config: str = ""
