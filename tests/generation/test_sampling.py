"""The sampler: as often as transformers' processors say, by its arguments alone."""

from __future__ import annotations

import math
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_cases import LOGITS, expected_probabilities, noise, params, plain_sample
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
)

from quantlab.errors import InputError
from quantlab.generation.engine import Engine
from quantlab.generation.native_engine import load_native
from quantlab.generation.sampling import Sampler, SamplingParams, sample
from quantlab.generation.torch_engine import TorchEngine
from quantlab.loading import load_model

HISTORY = [3, 1, 3, 3, 9, 4]
CHECKSUM = 55521978  # of 500 tokens: part of the contract, as seeds are


def assert_drawn_from(draws: list[int], probabilities: np.ndarray) -> None:
    """Nothing impossible, everything that is not rare, and frequencies within five deviations of chi-square."""
    counts = Counter(draws)
    expected = len(draws) * probabilities
    assert all(probabilities[token] > 0 for token in counts)
    assert all(counts[token] > 0 for token in np.flatnonzero(expected > 20))
    support = np.flatnonzero(expected > 5)  # the rule of thumb for chi-square
    statistic = sum((counts[token] - expected[token]) ** 2 / expected[token] for token in support)
    freedom = len(support) - 1
    assert statistic <= freedom + 5 * math.sqrt(2 * freedom)


SETTINGS = [
    {},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 4},
    {"top_k": 12},
    {"top_k": 100},
    {"top_p": 1e-6},
    {"top_p": 0.3},
    {"top_p": 0.8},
    {"top_p": 0.999},
    {"min_p": 0.1},
    {"min_p": 0.5},
    {"min_p": 1.0},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.5},
    {"repetition_penalty": 5.0},
    {"logit_bias": {0: 1.5, 3: -2.0, 4: 6.0, 7: -math.inf}},
    {"logit_bias": {1: 3.0, 9: -4.0}, "repetition_penalty": 1.5, "top_k": 5},
    {"temperature": 1.5, "top_k": 6, "top_p": 0.8, "min_p": 0.2, "repetition_penalty": 1.2},
    {"temperature": 0.7, "top_k": 5, "top_p": 0.9},
    {"temperature": 2.0, "top_p": 0.9, "min_p": 0.3},
]


@pytest.mark.parametrize("changes", SETTINGS, ids=lambda changes: " ".join(f"{k}={v}" for k, v in changes.items()))
@pytest.mark.parametrize("source", ["seeds", "positions"])
def test_tokens_come_as_often_as_transformers_processors_say(changes: dict[str, float], source: str) -> None:
    """Over many seeds at one position, and, as in a text, over many positions with one seed."""
    if source == "seeds":
        draws = [sample(LOGITS, HISTORY, params(**changes, seed=seed), 6) for seed in range(3000)]
    else:
        draws = [sample(LOGITS, HISTORY, params(**changes, seed=7), position) for position in range(3000)]
    assert_drawn_from(draws, expected_probabilities(LOGITS, HISTORY, params(**changes)))


def test_the_bounds_themselves_can_fail() -> None:
    """Draws at temperature 1 are not mistaken for draws at 1.25."""
    draws = [sample(LOGITS, [], params(seed=seed), 0) for seed in range(3000)]
    with pytest.raises(AssertionError):
        assert_drawn_from(draws, expected_probabilities(LOGITS, [], params(temperature=1.25)))


# Greedy.


@pytest.mark.parametrize("penalty", [1.0, 1.05, 2.0, 0.5])
def test_temperature_zero_takes_the_most_likely(penalty: float) -> None:
    """After the repetition penalty, whatever the other settings, seed and position."""
    generator = np.random.default_rng(0)
    for seed in range(50):
        logits = generator.normal(0, 2, 40).astype(np.float32)
        history = generator.integers(0, 40, 15).tolist()
        chosen = SamplingParams(repetition_penalty=penalty, temperature=0, top_k=3, top_p=0.1, min_p=0.9, seed=seed)
        scores = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([history]), torch.from_numpy(logits)[None])
        assert sample(logits, history, chosen, seed) == int(scores.argmax())


def test_ties_go_to_the_smaller_id() -> None:
    """Greedy, and where top-k cuts between equals; top-p and min-p drop none of the smaller ones either."""
    logits = np.array([0, 7, 1, 7, 7, 1], dtype=np.float32)
    assert sample(logits, [], params(temperature=0), 0) == 1
    for changes, survivors in (
        ({"top_k": 1}, {1}),
        ({"top_k": 2}, {1, 3}),
        ({"top_p": 0.1}, {1}),
        ({"top_p": 0.5}, {1, 3}),
        ({"min_p": 1.0}, {1, 3, 4}),
    ):
        assert {sample(logits, [], params(**changes, seed=seed), 0) for seed in range(200)} == survivors


def test_a_token_seen_often_is_penalized_once() -> None:
    """Positive logits are divided, negative ones multiplied, and unseen ones left: a worked example."""
    logits = np.array([4.0, 2.5, -1.0, -1.5], dtype=np.float32)
    assert sample(logits, [0], params(temperature=0, repetition_penalty=1.5), 0) == 0  # 4 / 1.5 = 2.67 > 2.5
    assert sample(logits, [0], params(temperature=0, repetition_penalty=1.7), 0) == 1  # 4 / 1.7 = 2.35 < 2.5
    assert sample(logits, [0] * 9, params(temperature=0, repetition_penalty=1.5), 0) == 0
    below = logits - 10  # -6, -7.5, -11, -11.5
    assert sample(below, [0], params(temperature=0, repetition_penalty=1.2), 0) == 0  # -6 * 1.2 = -7.2
    assert sample(below, [0], params(temperature=0, repetition_penalty=1.3), 0) == 1  # -6 * 1.3 = -7.8


def test_logits_are_left_as_they_were() -> None:
    before = LOGITS.copy()
    sample(LOGITS, HISTORY, SamplingParams(repetition_penalty=1.5), 0)
    assert np.array_equal(LOGITS, before)


# The engines.


class Scripted(Engine):
    """Logits are noise that the number of tokens decides."""

    name, exact_batches, context, vocabulary = "scripted", True, 100, 50

    def _forward(self, token_ids: list[int], wanted: int) -> np.ndarray:
        end = self.position + len(token_ids)
        return np.stack([noise(50, place) for place in range(end - wanted + 1, end + 1)])

    def _forget(self, position: int) -> None:
        pass


EVERYTHING = SamplingParams(
    logit_bias={5: 2.0},
    repetition_penalty=1.1,
    presence_penalty=0.4,
    frequency_penalty=0.3,
    penalty_window=20,
    temperature=1.2,
    seed=3,
)


def assert_decodes_by_sampling(engine: Engine, prompt: list[int], count: int) -> list[int]:
    """Each token that `decode` yields is the one for the engine's logits, text and position."""
    engine.prefill(prompt)
    drawn = []
    for token in engine.decode(EVERYTHING, count):
        assert engine.tokens == [*prompt, *drawn]
        assert token == plain_sample(engine.logits(), engine.tokens, EVERYTHING, engine.position, len(prompt))
        drawn.append(token)
    assert len(drawn) == count
    return drawn


def test_decode_passes_text_and_prompt_on() -> None:
    """And a sequence that was drawn before, rewound and drawn again is the same."""
    engine = Scripted()
    first = assert_decodes_by_sampling(engine, [3, 4, 4, 7], 40)
    assert assert_decodes_by_sampling(engine, [3, 4, 4, 7], 40) == first
    assert len(set(first)) > 5


def test_both_engines_draw_with_the_same_sampler(llama_model: Path) -> None:
    """The token is the same for the same logits: torch's own arrays and the native ones."""
    prompt = [1, 300, 45, 7, 411]
    with_torch = assert_decodes_by_sampling(TorchEngine(load_model(llama_model)), prompt, 12)
    exact = load_native(llama_model, activations="f32", kv="f32", threads=1)
    assert assert_decodes_by_sampling(exact, prompt, 12) == with_torch


def test_decode_refuses_a_bias_at_once() -> None:
    """Before a token is asked for."""
    engine = Scripted()
    with pytest.raises(InputError, match=r"^logit bias: token id 50 is outside the vocabulary of 50$"):
        engine.decode(params(logit_bias={50: 1.0}), 5)


# A draw is a function of its arguments.


def test_a_draw_does_not_depend_on_the_draws_before_it() -> None:
    """Forwards, backwards, twice, or alone: position and seed decide."""
    chosen = params(seed=11)
    forwards = [sample(LOGITS, [], chosen, position) for position in range(100)]
    backwards = [sample(LOGITS, [], chosen, position) for position in reversed(range(100))]
    assert forwards == backwards[::-1]
    assert sample(LOGITS, [], chosen, 57) == forwards[57]


def test_positions_and_seeds_draw_differently() -> None:
    """Of 12 tokens, neighbouring positions or seeds agree about as often as chance has it, here 23 % of the time."""
    table = np.array([[sample(LOGITS, [], params(seed=seed), p) for p in range(100)] for seed in range(40)])
    chance = float(np.square(expected_probabilities(LOGITS, [], params())).sum())
    assert chance == pytest.approx(0.23, abs=0.01)
    assert (table[:, 1:] == table[:, :-1]).mean() == pytest.approx(chance, abs=0.03)
    assert (table[1:] == table[:-1]).mean() == pytest.approx(chance, abs=0.03)


def test_the_largest_seed_and_a_far_position_work() -> None:
    chosen = params(seed=(1 << 64) - 1)
    assert sample(LOGITS, [], chosen, 1 << 40) == sample(LOGITS, [], chosen, 1 << 40)


def test_a_seed_means_the_same_text_for_ever() -> None:
    """The tokens that seeds 0 and 1 draw at the first twelve positions are part of the contract."""
    draws = [[sample(LOGITS, [], params(seed=seed), position) for position in range(12)] for seed in (0, 1)]
    assert draws == [[3, 7, 3, 7, 3, 3, 0, 7, 3, 0, 9, 3], [3, 5, 7, 0, 3, 6, 3, 3, 7, 3, 1, 3]]


def test_a_long_text_is_the_same_on_every_machine() -> None:
    """Every step takes part, with logits that no library's arithmetic made; one draw that differs changes the sum."""
    chosen = SamplingParams(
        repetition_penalty=1.1, presence_penalty=0.2, frequency_penalty=0.1, temperature=1.3, top_p=0.97, min_p=0.01
    )
    chosen = replace(chosen, top_k=300, seed=12345)
    sampler, history = Sampler(chosen, 1000), [1, 2, 3]
    for position in range(3, 500):
        logits = (np.arange(1000, dtype=np.int64) * (2 * position + 1) * 40503 % 4099 - 2500).astype(np.float32) / 256
        history.append(sampler.draw(logits, history, position, prompt=3))
    assert zlib.crc32(np.array(history, "<i4").tobytes()) == CHECKSUM


# Whatever the input.


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    logits=st.lists(
        st.one_of(st.floats(-100, 100, width=32), st.sampled_from([-math.inf, -1e30, 3e38, 0.0])),
        min_size=1,
        max_size=30,
    ),
    chosen=st.builds(
        SamplingParams,
        repetition_penalty=st.floats(0.1, 10),
        temperature=st.one_of(st.just(0.0), st.floats(1e-3, 100)),
        top_k=st.integers(0, 40),
        top_p=st.floats(1e-9, 1),
        min_p=st.floats(0, 1),
        seed=st.integers(0, (1 << 64) - 1),
    ),
    history=st.lists(st.integers(0, 29), max_size=10),
    position=st.integers(0, 1 << 20),
)
def test_the_token_is_one_that_can_come(
    logits: list[float], chosen: SamplingParams, history: list[int], position: int
) -> None:
    """A valid id, of a logit that is not impossible, among the k likeliest, and no less likely than min-p allows."""
    if max(logits) == -math.inf:
        logits = [*logits, 0.0]
    numbers = np.array(logits, dtype=np.float32)
    seen = [token for token in history if token < len(numbers)]
    token = sample(numbers, seen, chosen, position)
    assert isinstance(token, int)
    assert 0 <= token < len(numbers)
    scores = numbers.astype(np.float64)
    for other in set(seen):
        penalty = chosen.repetition_penalty
        scores[other] = scores[other] / penalty if scores[other] > 0 else scores[other] * penalty
    most = float(np.finfo(np.float32).max)  # scores are fp32, and what was finite stays so
    scores[np.isfinite(scores)] = np.clip(scores, -most, most).astype(np.float32)[np.isfinite(scores)]
    assert scores[token] > -math.inf
    if chosen.temperature == 0:
        assert scores[token] == scores.max()
    else:
        assert not chosen.top_k or (scores > scores[token]).sum() < chosen.top_k
        share = math.exp((scores[token] - scores.max()) / chosen.temperature)
        assert share > 2.0**-41
        assert share >= chosen.min_p * (1 - 1e-5)  # weights are fp32: 2^-24 of a depth of up to 30
