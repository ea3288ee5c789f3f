"""Speculation changes how long a text takes and nothing else: the same tokens with drafts and without."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_adapters import random_adapter

from quantlab import InputError, generate, quantize_checkpoint
from quantlab.checkpoint import Tokenizer, load_tokenizer
from quantlab.generation.draft_model import DraftModel
from quantlab.generation.drafters import load_draft_model, speculation_for
from quantlab.generation.drafts import Offer
from quantlab.generation.generator import complete
from quantlab.generation.native_engine import NativeEngine, load_native
from quantlab.generation.prompt_lookup import PromptLookup
from quantlab.generation.sampling import SamplingParams
from quantlab.generation.speculation import LENGTHS, Speculation
from quantlab.generation.torch_engine import TorchEngine
from quantlab.loading import load_model

KV_TYPES = ("f16", "f32", "q8_0")
PROPERTY = settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def folder(make_model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny packed Llama with heads of 32, as a q8_0 cache wants them."""
    folder = tmp_path_factory.mktemp("speculating")
    make_model(folder / "float", "llama", head_dim=32)
    quantize_checkpoint(folder / "float", folder / "packed")
    return folder / "packed"


@pytest.fixture(scope="module")
def engines(folder: Path) -> dict[str, NativeEngine]:
    return {kv: load_native(folder, threads=1, kv=kv) for kv in KV_TYPES}


@pytest.fixture(scope="module")
def short_engines(folder: Path) -> dict[int, NativeEngine]:
    return {context: load_native(folder, threads=1, context=context) for context in (8, 20, 50)}


@pytest.fixture(scope="module")
def draft_engines(folder: Path, make_model, tmp_path_factory: pytest.TempPathFactory) -> dict[str, NativeEngine]:
    """The model's own float original, which agrees often, and a random one with a context of 24, which never does."""
    other = make_model(tmp_path_factory.mktemp("other"), "gpt2", seed=7)
    return {
        "original": load_native(folder.parent / "float", threads=1),
        "random": load_native(other, threads=1, context=24),
    }


class SetOfTokens:
    """Allows a third of the vocabulary, another one after each token."""

    def __init__(self) -> None:
        self.taken: list[int] = []
        self.finished = False

    def allowed(self) -> np.ndarray | None:
        return None if len(self.taken) % 4 == 3 else np.arange(512) % 3 == sum(self.taken) % 3

    def take(self, token: int) -> None:
        allowed = self.allowed()
        assert allowed is None or allowed[token]
        self.taken.append(token)


class Guesses:
    """A drafter that knows the text and lies at some places."""

    odds = (0.5,)

    def __init__(self, text: Sequence[int], lies: Sequence[bool]) -> None:
        self.text, self.lies = list(text), list(lies)

    def offer(self, text: list[int]) -> Offer | None:
        assert text == self.text[: len(text)]
        return Offer(0, len(self.text) - len(text)) if len(text) < len(self.text) else None

    def draft(self, text: list[int], count: int) -> list[int]:
        places = range(len(text), len(text) + count)
        return [(self.text[place] + self.lies[place % len(self.lies)]) % 512 for place in places]


def drawn(engine: NativeEngine, prompt: Sequence[int], params: SamplingParams, count: int, **others) -> list[int]:
    engine.prefill(prompt)
    return list(engine.decode(params, count, **others))


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 3.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.5]),
    frequency_penalty=st.sampled_from([0.0, -0.5]),
    penalty_window=st.sampled_from([0, 5]),
    logit_bias=st.sampled_from([{}, {7: 9.0, 8: float("-inf")}]),
    seed=st.integers(0, 9),
)
PROMPTS = st.one_of(
    st.lists(st.integers(3, 511), min_size=1, max_size=40),
    st.lists(st.integers(3, 511), min_size=1, max_size=4).map(lambda part: part * 8),
)


@given(
    prompt=PROMPTS,
    params=PARAMS,
    kv=st.sampled_from(KV_TYPES),
    count=st.integers(1, 60),
    constrained=st.booleans(),
    draft=st.sampled_from([None, "original", "random"]),
    mode=st.sampled_from(["auto", "lookup"]),
    most=st.sampled_from([1, 4, 15, 40]),
)
@PROPERTY
def test_the_same_tokens_with_speculation_and_without(
    engines, draft_engines, prompt, params, kv, count, constrained, draft, mode, most
) -> None:
    """Whatever the text, the parameters, the cache and the drafters; the sequence is left as plain decoding leaves it,
    with its logits.
    """
    engine = engines[kv]
    expected = drawn(engine, prompt, params, count, constraint=SetOfTokens() if constrained else None)
    tokens, logits = list(engine.tokens), engine.logits().copy()
    speculation = speculation_for(
        "auto" if draft else mode, engine, params, len(prompt),
        draft_model=draft_engines.get(draft), draft_tokens=most,
    )  # fmt: skip
    got = drawn(
        engine, prompt, params, count, constraint=SetOfTokens() if constrained else None, speculation=speculation
    )
    assert got == expected
    assert engine.tokens == tokens
    assert np.array_equal(engine.logits(), logits)


@given(
    lies=st.lists(st.booleans(), min_size=1, max_size=7),
    count=st.integers(1, 40),
    context=st.sampled_from([8, 20, 50]),
    most=st.sampled_from([1, 3, 15]),
    left=st.integers(0, 40),
)
@PROPERTY
def test_right_and_wrong_guesses_are_told_apart(engines, short_engines, lies, count, context, most, left) -> None:
    """By the end of the context, of what was asked for, and wherever the reader leaves."""
    engine = short_engines[context]
    params, prompt = SamplingParams(temperature=1.0), [1, 300, 45, 7]
    expected = drawn(engine, prompt, params, count)
    drafter = Guesses(prompt + drawn(engines["f16"], prompt, params, 60), lies)
    speculation = Speculation([drafter], most=most, always=True)
    assert drawn(engine, prompt, params, count, speculation=speculation) == expected
    assert 0 <= speculation.accepted <= speculation.drafted
    if not any(lies):
        assert speculation.accepted == speculation.drafted
    if all(lies):
        assert speculation.accepted == 0
    engine.prefill(prompt)
    with engine.decode(params, count, speculation=Speculation([drafter], most=most, always=True)) as decoding:
        seen = [token for _, token in zip(range(left), decoding, strict=False)]
    assert seen == expected[: len(seen)]
    assert engine.tokens == prompt + expected[: max(0, len(seen) - 1)]


def test_drafts_that_are_right_save_passes(folder: Path) -> None:
    """Sixteen tokens a pass, counted in calls of the decoder."""
    engine = load_native(folder, threads=1)
    params, prompt = SamplingParams(temperature=1.0), [1, 300, 45, 7]
    text = drawn(engine, prompt, params, 81)
    passes: list[int] = []
    forward = engine._forward
    engine._forward = lambda ids, wanted: passes.append(len(ids)) or forward(ids, wanted)
    speculation = Speculation([Guesses(prompt + text, [False])], always=True)
    assert drawn(engine, prompt, params, 81, speculation=speculation) == text
    assert passes == [1, 1, 16, 16, 16, 16, 15]  # the end of the prompt again, a plain step to compare with
    assert (speculation.drafted, speculation.accepted) == (74, 74)


# A completion.


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


def test_a_completion_is_the_same_and_counts_drafts(engines, draft_engines, tokenizer: Tokenizer) -> None:
    """With stop strings and end tokens in the middle of a draft."""
    params = SamplingParams(temperature=0.7, seed=2)
    plain = complete(engines["f16"], tokenizer, "The lamp", max_tokens=60, params=params, speculation="off")
    assert (plain.timings.drafted_tokens, plain.timings.accepted_tokens) == (0, 0)
    stop = plain.text[12:15]
    ending = Tokenizer(tokenizer.backend, tokenizer.bos, frozenset({plain.token_ids[20]}))
    ways = ({"speculation": "off"}, {"speculation": "lookup"}, {"draft_model": draft_engines["original"]})
    for words, stops in [(tokenizer, []), (tokenizer, [stop]), (ending, []), (ending, [stop])]:
        found = [
            complete(engines["f16"], words, "The lamp", max_tokens=60, params=params, stop=stops, **way) for way in ways
        ]
        assert len({(each.text, each.token_ids, each.finish_reason) for each in found}) == 1
    repeating = "One day, one day, one day, one day,"
    greedy = SamplingParams(temperature=0)
    looked = complete(engines["f16"], tokenizer, repeating, max_tokens=60, params=greedy, speculation="lookup")
    assert 0 <= looked.timings.accepted_tokens <= looked.timings.drafted_tokens > 0
    assert looked.token_ids == complete(engines["f16"], tokenizer, repeating, max_tokens=60, params=greedy,
                                        speculation="off").token_ids  # fmt: skip


def test_adapters_change_nothing_about_it(folder: Path) -> None:
    engine = load_native(folder, threads=1, adapters=[random_adapter(folder)])
    params, prompt = SamplingParams(temperature=0), [5, 6, 7] * 6
    expected = drawn(engine, prompt, params, 40)
    assert drawn(engine, prompt, params, 40, speculation=Speculation([PromptLookup()], always=True)) == expected


def test_the_torch_engine_decodes_plainly(folder: Path, tokenizer: Tokenizer) -> None:
    """Its logits depend on how many tokens come at once, in their last bits."""
    engine = TorchEngine(load_model(folder))
    completion = complete(engine, tokenizer, "a a a a a a", max_tokens=20, speculation="lookup")
    assert completion.timings.drafted_tokens == 0


# Prompt lookup.


def offered(lookup: PromptLookup, text: list[int], count: int = 99) -> list[int]:
    offer = lookup.offer(text)
    return [] if offer is None else lookup.draft(text, min(count, offer.most))


def test_the_longest_match_counts_and_the_last_of_equals() -> None:
    """Worked examples."""
    assert offered(PromptLookup(), [1, 2, 3, 4, 1, 2]) == [3, 4, 1, 2]
    assert offered(PromptLookup(), [1, 2, 3, 9, 2, 5, 1, 2]) == [3, 9, 2, 5, 1, 2]
    assert offered(PromptLookup(), [1, 2, 8, 1, 2, 9, 1, 2]) == [9, 1, 2]  # the last one
    assert offered(PromptLookup(), [7, 1, 2, 8, 6, 1, 2, 9, 7, 1, 2]) == [8, 6, 1, 2, 9, 7, 1, 2]  # the longer one
    assert offered(PromptLookup(), [1, 2, 3, 4]) == []
    assert offered(PromptLookup(), [1]) == []
    assert offered(PromptLookup(), [5, 5, 5]) == [5]


@given(text=st.lists(st.integers(0, 2), min_size=1, max_size=80), step=st.integers(1, 7))
@PROPERTY
def test_an_index_that_grew_is_the_one_of_the_whole_text(text: list[int], step: int) -> None:
    """And both give what a search backwards finds."""
    grown = PromptLookup()
    for end in range(1, len(text), step):
        grown.offer(text[:end])
    found = offered(grown, text)
    assert found == offered(PromptLookup(), text)
    places = [place for place in range(2, len(text)) if text[place - 2 : place] == text[-2:]][-8:]
    matches = [max(n for n in range(2, min(place, 16) + 1) if text[place - n : place] == text[-n:]) for place in places]
    if not places:
        assert found == []
    else:
        place = max(place for place, match in zip(places, matches, strict=True) if match == max(matches))
        assert found == text[place : place + 64]


def test_grades_rise_with_the_match() -> None:
    """2, 3, 4, 8 and 16 tokens."""
    grades = []
    for length in (2, 3, 4, 7, 8, 15, 16, 40):
        match = list(range(100, 100 + length))
        grades.append(PromptLookup().offer([1, *match, 2, 3, *match]).grade)
    assert grades == [0, 1, 2, 2, 3, 3, 4, 4]


# What pays.


class Clock:
    """Time passes with the tokens of passes alone."""

    def __init__(self, cost: float) -> None:
        self.now, self.cost = 0.0, cost

    def __call__(self) -> float:
        return self.now

    def take(self, tokens: int) -> None:
        self.now += 1 + self.cost * (tokens - 1)


def simulated(right: Sequence[bool], cost: float, tokens: int = 4000) -> tuple[float, Speculation]:
    """Seconds a token, where a plain step takes one and each drafted token `cost`; `right` tells, in turn, whether the
    guess at a place is right.
    """
    clock = Clock(cost)
    speculation = Speculation([Guesses([0] * (tokens + 50), [False])], clock=clock)
    text = [0]
    while len(text) < tokens:
        is_asked = len(text) >= speculation.wake
        draft = speculation.draft(text, 50) if is_asked else []
        clock.take(1 + len(draft))
        accepted = 0
        while accepted < len(draft) and right[(len(text) + accepted) % len(right)]:
            accepted += 1
        if is_asked:
            speculation.passed()
            speculation.settle(accepted, len(text))
        text += [0] * (accepted + 1)
    return clock.now / len(text), speculation


def test_guesses_that_are_never_right_cost_next_to_nothing() -> None:
    """Within the allowance of a two-hundredth, and tried again now and then."""
    for cost in (0.05, 0.3, 1.0):
        seconds, speculation = simulated([False], cost)
        assert 1 < seconds <= 1.006
        assert speculation.drafted > 3
    assert simulated([False], 0.3, tokens=100)[0] <= 1.016


def test_guesses_that_are_always_right_pay() -> None:
    """Sixteen tokens at the price of 2.5 or 5.5."""
    assert simulated([True], 0.1)[0] < 0.2
    assert simulated([True], 0.3)[0] < 0.4
    assert simulated([True], 1.1)[0] <= 1.006  # a pass gives nothing for nothing


def test_half_right_guesses_pay_where_they_are_cheap() -> None:
    every_other = np.random.default_rng(0).random(997) < 0.5
    assert simulated(every_other, 0.02)[0] < 0.65  # 0.57 if all were known beforehand
    assert simulated(every_other, 0.9)[0] <= 1.006


def test_a_text_that_begins_to_repeat_is_noticed() -> None:
    """After 3,000 tokens of prose; and the other way round, what was saved is not wasted."""
    prose_first = [False] * 3000 + [True] * 1000
    assert simulated(prose_first, 0.1)[0] < 0.84
    assert simulated([True] * 1000 + [False] * 3000, 0.1)[0] < 0.84


def test_no_draft_is_longer_than_asked_for() -> None:
    speculation = Speculation([Guesses([0] * 100, [False])], most=5, always=True, clock=Clock(0).__call__)
    assert max(LENGTHS) > 5
    speculation.draft([0], 50)
    speculation.passed()
    speculation.settle(0, 1)
    speculation._step = 1.0
    assert len(speculation.draft([0, 0], 50)) == 5
    speculation.settle(0, 2)
    assert len(speculation.draft([0, 0], 3)) == 3
    speculation.settle(0, 2)
    assert speculation.draft([0, 0], 0) == []


# Draft models.


def test_a_draft_model_that_is_the_model_is_always_right(folder: Path) -> None:
    """It draws with the same seed at the same places: also at temperature 2."""
    engine, params = load_native(folder, threads=1), SamplingParams(temperature=2.0, repetition_penalty=1.2)
    expected = drawn(engine, [1, 5, 9], params, 50)
    drafter = DraftModel(load_native(folder, threads=1), params, engine.vocabulary, 3)
    speculation = Speculation([drafter], most=4, always=True)
    assert drawn(engine, [1, 5, 9], params, 50, speculation=speculation) == expected
    assert speculation.accepted == speculation.drafted > 30


def test_a_draft_model_of_another_tokenizer_is_refused(
    folder: Path, make_model, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """In one line, before the models are loaded."""
    other = make_model(tmp_path / "other", "llama")
    content = (other / "tokenizer.json").read_text(encoding="utf-8")
    (other / "tokenizer.json").write_text(content.replace("</s>", "</t>"), encoding="utf-8")
    with pytest.raises(InputError, match=r"different tokens .*; a draft model needs the tokenizer of the model$"):
        generate(folder, "The lamp", draft_model=other)
    assert load_draft_model(folder.parent / "float", folder, tokenizer).vocabulary == 512


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"speculation": "always"}, "speculation 'always': choose one of: auto, lookup, off"),
        ({"draft_tokens": 0}, "0 draft tokens: at least 1 is needed"),
        ({"speculation": "off", "draft_model": "x"}, "speculation 'off' uses no draft model"),
    ],
)
def test_what_makes_no_sense_is_refused(folder: Path, arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        generate(folder, "The lamp", **arguments)
