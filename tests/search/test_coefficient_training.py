"""Learning coefficients: where it ends, that it goes on after a kill, and a case whose best coefficients are known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from coefficient_models import config_text, moved, noise, opened

from quantlab.errors import InputError
from quantlab.loading import load_model
from quantlab.search import coefficient_training
from quantlab.search.coefficient_training import CoefficientSettings, CoefficientTraining
from quantlab.search.coefficient_windows import LearningText, split_windows
from quantlab.search.coefficients import Coefficients, Group

START = np.array([[0.25, 0.75], [0.5, 0.5], [1.0, 0.0]])


def coefficients(*, keeps_sum: bool = False) -> Coefficients:
    groups = tuple(Group(f"group {i}", (), ()) for i in range(len(START)))
    return Coefficients("linear", groups, (0, 1), ("a", "b"), START, keeps_sum)


class Bowl:
    """A loss of its own making, least at `goal`; a window's first id shifts the gradient."""

    def __init__(self, goal: np.ndarray, fail_at: int | None = None) -> None:
        self.goal, self.values, self.calls, self.fail_at = goal, np.zeros_like(goal), 0, fail_at
        self.seen: list[tuple[int, ...]] = []

    def take(self, values: np.ndarray) -> None:
        self.values = values

    def gradient(self, windows: Sequence[tuple[int, ...]]) -> tuple[float, np.ndarray]:
        self.calls += 1
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        self.seen += windows
        shift = 1e-3 * np.mean([window[0] for window in windows])
        return float(self.loss()), 2 * (self.values - self.goal) + shift

    def losses(self, window: tuple[int, ...]) -> np.ndarray:
        return np.full(len(window) - 1, self.loss())

    def loss(self) -> float:
        return 1.0 + float(((self.values - self.goal) ** 2).sum())


TEXT = split_windows([(i % 5, i, i) for i in range(64)], "text")
SETTINGS = CoefficientSettings(steps=80, step_tokens=6, learning_rate=0.1, evaluations=8)


def trained(bowl: Bowl, file=None, *, keeps_sum: bool = False, settings=SETTINGS, learnable=(True, True, True)):
    training = CoefficientTraining(bowl, coefficients(keeps_sum=keeps_sum), np.array(learnable), TEXT, settings, file)
    return training.run()


def test_it_finds_the_bottom_and_leaves_alone_what_is_equal():
    goal = np.array([[0.6, 0.1], [0.9, 0.9], [0.0, 0.0]])
    state = trained(Bowl(goal), learnable=(True, True, False))
    np.testing.assert_allclose(state.best[:2], goal[:2], atol=0.02)
    assert np.array_equal(state.best[2], START[2])
    assert state.best.round(6).tolist() == state.best.tolist()
    assert [step for step, _ in state.history] == list(range(0, 81, 10))


def test_an_average_stays_one():
    """The nearest point of the bottom whose rows have the start's sums."""
    goal = np.array([[0.9, 0.5], [0.2, 0.6], [0.0, 0.0]])
    state = trained(Bowl(goal), keeps_sum=True)
    np.testing.assert_allclose(state.values.sum(axis=1), 1, atol=1e-12)
    np.testing.assert_allclose(state.best, goal + (1 - goal.sum(axis=1, keepdims=True)) / 2, atol=0.02)


def test_a_start_that_is_best_is_kept():
    state = trained(Bowl(START))
    assert state.best_step == 0
    assert np.array_equal(state.best, START)


def test_what_only_gets_worse_is_given_up(monkeypatch):
    monkeypatch.setattr(coefficient_training, "is_given_up", lambda history, *_: len(history) == 4)
    assert trained(Bowl(START)).step == 30


def test_training_reads_training_windows_alone():
    bowl = Bowl(START + 1)
    trained(bowl)
    assert set(bowl.seen) == set(TEXT.training)
    assert not set(bowl.seen) & {*TEXT.selection, *TEXT.report}


@pytest.mark.parametrize("fail_at", [1, 10, 11, 47])
def test_a_killed_run_goes_on_to_the_same_numbers(tmp_path, fail_at):
    goal, file = np.array([[0.6, 0.1], [0.9, 0.9], [0.0, 0.0]]), tmp_path / "state.json"
    whole = trained(Bowl(goal))
    with pytest.raises(KeyboardInterrupt):
        trained(Bowl(goal, fail_at), file)
    bowl = Bowl(goal)
    resumed = trained(bowl, file)
    assert bowl.calls == 80 - fail_at + 1
    assert resumed.history == whole.history
    assert resumed.best_step == whole.best_step
    assert np.array_equal(resumed.best, whole.best)
    assert np.array_equal(resumed.values, whole.values)
    assert trained(Bowl(goal), file).history == whole.history  # nothing is left to do


@pytest.mark.parametrize(
    "content", ["{", '{"step": 1}', '{"step": 1, "values": [1], "first": [1], "second": [1], "best": 0}']
)
def test_a_damaged_state_is_one_line(tmp_path, content):
    (tmp_path / "state.json").write_text(content)
    with pytest.raises(InputError, match=r"state\.json"):
        trained(Bowl(START), tmp_path / "state.json")


def test_a_start_that_overflows_is_refused(tmp_path):
    with pytest.raises(InputError, match="not finite"):
        trained(Bowl(START * np.nan), tmp_path / "state.json")
    assert not (tmp_path / "state.json").exists()


WRONG = {"by": "head", "steps": 0, "step_tokens": 0, "evaluations": 0, "patience": 0, "learning_rate": float("nan")}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_settings(name):
    with pytest.raises(InputError, match=str(WRONG[name])):
        CoefficientSettings(**{name: WRONG[name]})


def test_splits_share_no_window():
    windows = [(i,) for i in range(300)]
    text = split_windows(windows, "text")
    assert sorted([*text.training, *text.selection, *text.report]) == windows
    assert (len(text.report), len(text.selection)) == (64, 16)
    assert split_windows(windows, "text") == text
    with pytest.raises(InputError, match="--learn text: too short: 31 different windows of up to 1 tokens, and 32"):
        split_windows(windows[:31], "text")


def test_known_multiples_of_known_differences_are_found(make_model, tmp_path):
    """What the text is drawn from is base + 0.7 a - 0.4 b, and no model predicts it better. The config starts at half
    a and half b.
    """
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    truth = make_model(tmp_path / "truth", "llama", **shape)
    a, b = noise(truth, 1, 0.06), noise(truth, 2, 0.06)
    base = moved(truth, tmp_path / "base", {name: -0.7 * a[name] + 0.4 * b[name] for name in a})
    one, two = moved(base, tmp_path / "one", a), moved(base, tmp_path / "two", b)
    text = drawn_from(load_model(truth), 200, 33)
    merged, learned = opened(config_text("task_arithmetic", base, {one: 0.5, two: 0.5}), "model", base)
    settings = CoefficientSettings(by="model", steps=30, step_tokens=330, learning_rate=0.12, evaluations=3)
    with merged:
        state = CoefficientTraining(merged, learned, merged.learnable, text, settings).run()
    np.testing.assert_allclose(state.best, [[0.7, -0.4]], atol=0.15)
    assert dict(state.history)[state.best_step] < state.history[0][1] - 0.05


@torch.no_grad()
def drawn_from(model, count: int, length: int) -> LearningText:
    """Windows of text that a model says."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(512, (count, 1), generator=generator)
    for _ in range(length - 1):
        chances = model(input_ids=ids, use_cache=False).logits[:, -1].softmax(dim=-1)
        ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)], dim=1)
    return split_windows([tuple(map(int, window)) for window in ids.tolist()], "text")
