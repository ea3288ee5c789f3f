"""Which windows a step takes, and how fast it goes; the rest of the loop is tested where scales are learned."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from quantlab import InputError
from quantlab.calibration.padded_windows import pad_windows
from quantlab.calibration.scale_training import ScaleTraining, Schedule
from quantlab.calibration.teacher import Targets

SCHEDULE = Schedule(
    steps=40,
    batch=3,
    part_tokens=4,
    learning_rates={"scales": 0.5},
    temperature=1.0,
    evaluate_every=10,
    patience=9,
    save_seconds=1e9,
    seed=0,
)
WINDOWS = pad_windows([[3, 4]] * 24, 512, seed=0)


def test_an_epoch_visits_every_training_window_once():
    training = WINDOWS.training
    assert len(training) == 21
    epochs = [np.concatenate([SCHEDULE.windows(step, training) for step in range(7 * e, 7 * e + 7)]) for e in range(2)]
    for visited in epochs:
        assert sorted(visited) == list(training)
    assert epochs[0].tolist() != epochs[1].tolist()
    assert SCHEDULE.windows(9, training).tolist() == epochs[1][6:9].tolist()


def test_a_teacher_is_told_of_all_windows_that_a_run_can_ask_for():
    one_step = Schedule(**{**vars(SCHEDULE), "steps": 1})
    used = one_step.windows_used(WINDOWS)
    assert set(used) == {*one_step.windows(0, WINDOWS.training), *WINDOWS.held_out}
    assert len(SCHEDULE.windows_used(WINDOWS)) == len(WINDOWS)


class OneNumber(torch.nn.Module):
    """A model of two tokens whose only parameter is a difference of logits."""

    def __init__(self) -> None:
        super().__init__()
        self.difference = torch.nn.Parameter(torch.zeros(()))
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=2))
        self.device = torch.device("cpu")

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        logits = torch.stack([self.difference, torch.zeros(())]).expand(*input_ids.shape, 2)
        return SimpleNamespace(logits=logits)


class Fixed:
    """A teacher that says the same of every token."""

    def __init__(self, difference: float) -> None:
        self.log_p = torch.tensor([difference, 0.0]).log_softmax(dim=0)

    def targets(self, windows: np.ndarray, length: int) -> Targets:
        return Targets(self.log_p.expand(len(windows), length, 2))


def trained(teacher: Fixed, schedule: Schedule = SCHEDULE) -> tuple[OneNumber, ScaleTraining]:
    model = OneNumber()
    parameters = {"scales": {"difference": model.difference}}
    return model, ScaleTraining(model, parameters, teacher, WINDOWS, schedule, lambda: None)


def test_training_reaches_the_teacher_and_says_how_near():
    model, training = trained(Fixed(2.0))
    result = training.run()
    assert float(model.difference.detach()) == pytest.approx(2.0, abs=0.05)
    p = 1 / (1 + math.exp(-2.0))
    expected = p * math.log(p / 0.5) + (1 - p) * math.log((1 - p) / 0.5)
    assert result.start_divergence == pytest.approx(expected, rel=1e-5)
    assert result.best_divergence < 1e-3
    assert [step for step, _ in result.history] == [0, 10, 20, 30, 40]


def test_the_learning_rate_rises_then_falls_to_zero():
    _, training = trained(Fixed(2.0))
    rates = []
    for _ in range(40):
        rates.append(training.optimizer.param_groups[0]["lr"])
        training._train_step()
    assert rates[:3] == pytest.approx([0.5 / 3, 1.0 / 3, 0.5])
    assert all(after < before for before, after in itertools.pairwise(rates[2:]))
    assert training.optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)


def test_a_model_that_is_already_there_keeps_its_start():
    model, training = trained(Fixed(0.0))
    result = training.run()
    assert (result.best_step, result.best_divergence, float(model.difference.detach())) == (0, 0.0, 0.0)


def test_a_divergence_that_is_no_number_is_an_error():
    _, training = trained(Fixed(math.nan))
    with pytest.raises(InputError, match="not finite"):
        training.run()


def test_a_damaged_state_is_an_error(tmp_path):
    _, training = trained(Fixed(2.0))
    training.state_file = tmp_path / "state.pt"
    training.state_file.write_bytes(b"damaged")
    with pytest.raises(InputError, match="cannot be read"):
        training.run()
