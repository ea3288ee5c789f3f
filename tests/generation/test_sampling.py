"""The sampler: the draws of a plain full sort, as often as transformers' processors say, by its arguments alone."""

from __future__ import annotations

import math
import pickle
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from quantlab.errors import InputError
from quantlab.generation.engine import Engine
from quantlab.generation.native_engine import load_native
from quantlab.generation.sampling import Sampler, SamplingParams, sample
from quantlab.generation.torch_engine import TorchEngine
from quantlab.loading import load_model
from quantlab.native import _core

OFF = {"repetition_penalty": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
LOGITS = np.array([2.0, -1.0, 0.5, 3.0, -4.0, 1.25, 0.0, 2.75, -2.5, 1.75, -0.5, 0.25], dtype=np.float32)
HISTORY = [3, 1, 3, 3, 9, 4]
CHECKSUM = 55521978  # of 500 tokens: part of the contract, as seeds are


def params(**changes: float) -> SamplingParams:
    """Every step off but those that are named."""
    return SamplingParams(**{**OFF, **changes})


def expected_probabilities(logits: np.ndarray, history: list[int], params: SamplingParams) -> np.ndarray:
    """By transformers' processors, in the order in which `generate` runs them, in float64."""
    steps = LogitsProcessorList()
    if params.logit_bias:
        steps.append(SequenceBiasLogitsProcessor([[[token], bias] for token, bias in params.logit_bias.items()]))
    if params.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    steps.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        steps.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        steps.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        steps.append(MinPLogitsWarper(params.min_p))
    scores = steps(torch.tensor([history or [0]]), torch.from_numpy(logits.astype(np.float64))[None])
    return scores.softmax(1)[0].numpy()


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


# Against a plain implementation: float64, a full sort, numpy's own generator.


def plain_scores(logits: np.ndarray, history: list[int], params: SamplingParams, prompt: int) -> np.ndarray:
    """float64 [vocabulary] after bias and penalties."""
    scores = logits.astype(np.float64)
    for token, bias in params.logit_bias.items():
        scores[token] += bias
    start = len(history) - params.penalty_window if params.penalty_window else 0
    recent = list(enumerate(history))[max(start, 0) :]
    for token in {token for _, token in recent}:
        factor = params.repetition_penalty
        scores[token] = scores[token] / factor if scores[token] > 0 else scores[token] * factor
    for token, times in Counter(token for index, token in recent if index >= prompt).items():
        scores[token] -= params.presence_penalty + times * params.frequency_penalty
    return scores


def plain_kept(scores: np.ndarray, params: SamplingParams) -> tuple[np.ndarray, np.ndarray]:
    """The ids that can come, by falling score, and their weights."""
    ids = np.argsort(-scores, kind="stable")[: params.top_k or None]
    weights = np.exp((scores[ids] - scores[ids[0]]) / params.temperature)
    nucleus = int(np.searchsorted(np.cumsum(weights), params.top_p * weights.sum())) + 1
    kept = min(nucleus if params.top_p < 1 else len(ids), int((weights >= params.min_p).sum()))
    return ids[:kept], weights[:kept]


def plain_sample(logits: np.ndarray, history: list[int], params: SamplingParams, position: int, prompt: int = 0) -> int:
    scores = plain_scores(logits, history, params, prompt)
    if params.temperature == 0:
        return int(scores.argmax())
    ids, weights = plain_kept(scores, params)
    cumulative = np.cumsum(weights)
    share = np.random.Generator(np.random.Philox(key=params.seed, counter=position)).random()
    return int(ids[np.searchsorted(cumulative, share * cumulative[-1], side="right")])


CUTS = [
    {},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 63},
    {"top_k": 900},
    {"top_p": 0.5},
    {"top_p": 0.95},
    {"min_p": 0.05},
    {"top_p": 0.9, "min_p": 0.2},
    {"top_k": 40, "top_p": 0.95, "min_p": 0.05},
    {"top_k": 700, "top_p": 0.999, "min_p": 0.001},
]
every_cut = pytest.mark.parametrize("cuts", CUTS, ids=lambda cuts: " ".join(f"{k}={v}" for k, v in cuts.items()))


def noise(vocabulary: int, seed: int, spread: float = 3.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, spread, vocabulary).astype(np.float32)


@every_cut
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("vocabulary", [63, 64, 1000, 40_000])
def test_draws_are_those_of_a_full_sort(vocabulary: int, temperature: float, cuts: dict[str, float]) -> None:
    """Whatever was drawn with the same memory before: one sampler and samplers of their own give the same."""
    chosen = params(temperature=temperature, **cuts)
    samplers = {seed: Sampler(replace(chosen, seed=seed), vocabulary) for seed in range(4)}
    for position in range(8):
        logits = noise(vocabulary, position)
        for seed, sampler in samplers.items():
            expected = plain_sample(logits, [], replace(chosen, seed=seed), position)
            assert sampler.draw(logits, [], position) == expected
            assert sample(logits, [], replace(chosen, seed=seed), position) == expected


@every_cut
def test_the_plain_cuts_are_those_of_transformers(cuts: dict[str, float]) -> None:
    """The same ids can come, so the other tests compare with the right thing."""
    chosen = params(temperature=0.8, **cuts)
    for seed in range(5):
        logits = noise(2000, seed)
        ids, _ = plain_kept(logits.astype(np.float64), chosen)
        assert set(ids) == set(np.flatnonzero(expected_probabilities(logits, [], chosen)))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    data=st.data(),
    chosen=st.builds(
        SamplingParams,
        logit_bias=st.dictionaries(st.integers(0, 49), st.floats(-10, 10), max_size=5),
        repetition_penalty=st.floats(0.5, 3),
        presence_penalty=st.floats(-2, 2),
        frequency_penalty=st.floats(-2, 2),
        penalty_window=st.integers(0, 12),
        temperature=st.one_of(st.just(0.0), st.floats(0.1, 5)),
        top_k=st.integers(0, 60),
        top_p=st.floats(0.01, 1),
        min_p=st.floats(0, 0.5),
        seed=st.integers(0, (1 << 64) - 1),
    ),
    history=st.lists(st.integers(0, 49), max_size=30),
)
def test_penalties_are_those_of_the_formulas(data: st.DataObject, chosen: SamplingParams, history: list[int]) -> None:
    """OpenAI's for presence and frequency (generated tokens), CTRL's for repetition (all), within the window."""
    prompt = data.draw(st.integers(0, len(history)))
    logits = noise(50, data.draw(st.integers(0, 1000)))
    position = len(history)
    assert sample(logits, history, chosen, position, prompt) == plain_sample(logits, history, chosen, position, prompt)


def test_presence_counts_once_and_frequency_each_time() -> None:
    """A worked example: of five tokens the first two are the prompt."""
    logits = np.array([5.0, 4.0, 3.0, 0.0], dtype=np.float32)
    history = [0, 0, 1, 1, 1]

    def drawn(**changes: float) -> int:
        return sample(logits, history, params(temperature=0, **changes), 5, prompt=2)

    assert drawn(presence_penalty=3) == 0  # the prompt's tokens count nothing
    assert drawn(logit_bias={0: -9}) == 1
    assert drawn(logit_bias={0: -9}, presence_penalty=0.9) == 1  # 4 - 0.9 > 3
    assert drawn(logit_bias={0: -9}, presence_penalty=1.1) == 2  # 4 - 1.1 < 3
    assert drawn(logit_bias={0: -9}, frequency_penalty=0.3) == 1  # 4 - 3 * 0.3 > 3
    assert drawn(logit_bias={0: -9}, frequency_penalty=0.4) == 2  # 4 - 3 * 0.4 < 3
    assert drawn(logit_bias={0: -9}, frequency_penalty=0.4, penalty_window=2) == 1  # 4 - 2 * 0.4 > 3
    assert drawn(frequency_penalty=-0.4) == 1  # below 0 repetition pays: 4 + 3 * 0.4 > 5
    assert drawn(repetition_penalty=2) == 2  # 5 / 2 and 4 / 2
    assert drawn(repetition_penalty=2, penalty_window=3) == 0  # the prompt is out of sight


def test_a_bias_forbids_or_forces() -> None:
    """Minus infinity, alone or for all but one; OpenAI's 100 is as good as certain."""
    chosen = params(logit_bias={3: -math.inf, 7: -math.inf})
    assert {3, 7}.isdisjoint(sample(LOGITS, [], replace(chosen, seed=seed), 0) for seed in range(300))
    assert {sample(LOGITS, [], params(logit_bias={4: 100.0}, seed=seed), 0) for seed in range(100)} == {4}
    all_but_one = {token: -math.inf for token in range(12) if token != 8}
    assert sample(LOGITS, [], params(logit_bias=all_but_one), 0) == 8


@pytest.mark.parametrize("cuts", [{}, {"top_k": 3000}, {"top_p": 1.0 - 2.0**-30}])
def test_equal_logits_come_in_the_order_of_their_ids(cuts: dict[str, float]) -> None:
    """So a draw is the random number times how many there are, rounded down; the worst case of a selection by score."""
    logits = np.full(5000, -2.5, np.float32)
    count = cuts.get("top_k", 5000)
    for seed in range(50):
        share = np.random.Generator(np.random.Philox(key=seed, counter=9)).random()
        assert sample(logits, [], params(seed=seed, **cuts), 9) == int(share * count)


def test_random_words_are_numpys() -> None:
    """Philox at every kind of key and counter, the last one too, whose successor carries."""
    last = (1 << 64) - 1
    numbers = np.random.default_rng(0).integers(0, last, 50, np.uint64, endpoint=True).tolist()
    for key in (0, 1, last, *numbers):
        for counter in (0, 1, 12345, last - 1, last, numbers[0]):
            assert _core.random_word(key, counter) == int(np.random.Philox(key=key, counter=counter).random_raw())


# The engines.


class Scripted(Engine):
    """Logits are noise that the number of tokens decides."""

    name, context, vocabulary = "scripted", 100, 50

    def _forward(self, token_ids: list[int]) -> np.ndarray:
        return noise(50, self.position + len(token_ids))

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


# What is refused.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"repetition_penalty": 0}, "repetition penalty must be greater than 0"),
        ({"repetition_penalty": -1}, "repetition penalty must be greater than 0"),
        ({"repetition_penalty": math.inf}, "repetition penalty must be greater than 0"),
        ({"repetition_penalty": math.nan}, "repetition penalty must be greater than 0"),
        ({"presence_penalty": math.nan}, "presence penalty must be finite"),
        ({"presence_penalty": math.inf}, "presence penalty must be finite"),
        ({"frequency_penalty": -math.inf}, "frequency penalty must be finite"),
        ({"penalty_window": -1}, "penalty window must be 0 or more"),
        ({"logit_bias": {-1: 0.0}}, "logit bias must be a number below infinity for token ids from 0 on"),
        ({"logit_bias": {0: math.inf}}, "logit bias must be a number below infinity for token ids from 0 on"),
        ({"logit_bias": {0: 1.0, 7: math.nan}}, "logit bias must be a number below infinity for token ids from 0 on"),
        ({"temperature": -0.1}, "temperature must be 0 or more"),
        ({"temperature": math.inf}, "temperature must be 0 or more"),
        ({"temperature": math.nan}, "temperature must be 0 or more"),
        ({"top_k": -1}, "top-k must be 0 or more"),
        ({"top_p": 0}, "top-p must be above 0 and at most 1"),
        ({"top_p": 1.01}, "top-p must be above 0 and at most 1"),
        ({"top_p": math.nan}, "top-p must be above 0 and at most 1"),
        ({"min_p": -0.01}, "min-p must be at least 0 and at most 1"),
        ({"min_p": 1.01}, "min-p must be at least 0 and at most 1"),
        ({"seed": -1}, "seed must be at least 0 and below 2^64"),
        ({"seed": 1 << 64}, "seed must be at least 0 and below 2^64"),
    ],
)
def test_a_setting_out_of_range_is_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(InputError) as caught:
        SamplingParams(**changes)
    assert str(caught.value) == message


def test_all_faults_are_told_at_once() -> None:
    """In one line."""
    with pytest.raises(InputError) as caught:
        SamplingParams(repetition_penalty=0, temperature=-1, top_k=-1, top_p=2, min_p=2, seed=-1)
    assert str(caught.value) == (
        "repetition penalty must be greater than 0; temperature must be 0 or more; top-k must be 0 or more; "
        "top-p must be above 0 and at most 1; min-p must be at least 0 and at most 1; "
        "seed must be at least 0 and below 2^64"
    )


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({3: math.nan}, "the logit of token 3 is NaN"),
        ({64: math.inf, 150: math.nan}, "the logit of token 64 is infinite"),
        ({199: math.nan}, "the logit of token 199 is NaN"),
        (dict.fromkeys(range(200), -math.inf), "every token's logit is minus infinity"),
    ],
)
@pytest.mark.parametrize(
    "chosen",
    [
        params(temperature=0),
        params(),
        params(top_k=5, top_p=0.5),
        params(repetition_penalty=2, logit_bias={3: 1, 64: -5, 199: 1}),
    ],
    ids=["greedy", "all", "cut", "penalties"],
)
def test_logits_that_are_not_numbers_are_refused(changes: dict[int, float], fault: str, chosen: SamplingParams) -> None:
    """Naming the position and the token; the sampler draws on afterwards."""
    sound = noise(200, 0)
    broken = sound.copy()
    broken[list(changes)] = list(changes.values())
    sampler = Sampler(chosen, 200)
    with pytest.raises(InputError) as caught:
        sampler.draw(broken, [3, 64, 199], 17)
    assert str(caught.value) == f"position 17: {fault}"
    assert sampler.draw(sound, [3, 64], 18) == plain_sample(sound, [3, 64], chosen, 18)


def test_a_history_outside_the_vocabulary_is_refused() -> None:
    for token in (-1, 12, 1 << 40):
        with pytest.raises(InputError, match=f"^position 2: token id {token} is outside the vocabulary of 12$"):
            sample(LOGITS, [3, token], params(repetition_penalty=2), 2)


def test_the_number_of_logits_must_be_the_vocabularys() -> None:
    with pytest.raises(InputError, match=r"^position 0: there are 11 logits; expected 12$"):
        Sampler(params(), 12).draw(LOGITS[:11], [], 0)


def test_parameters_are_data() -> None:
    """Equal, hashable, their own copy of the biases, and through pickle the same."""
    biases = {3: 1.0}
    chosen = params(logit_bias=biases)
    biases[4] = 2.0
    assert chosen == params(logit_bias={3: 1.0}) != params(logit_bias={3: 2.0})
    assert hash(chosen) == hash(params(logit_bias={3: 1.0}))
    assert pickle.loads(pickle.dumps(chosen)) == chosen
