"""The sampler: the draws of a plain full sort, and what settings and arguments it refuses."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_cases import LOGITS, expected_probabilities, noise, params, plain_kept, plain_sample

from quantlab.errors import InputError
from quantlab.generation.sampling import Sampler, SamplingParams, sample
from quantlab.native import _core

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
