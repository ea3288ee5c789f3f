"""Several continuations of one prompt: each is the completion of its own seed, to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from quantlab import quantize_checkpoint
from quantlab.checkpoint import Tokenizer, load_tokenizer
from quantlab.checkpoint.families import FAMILIES
from quantlab.errors import InputError
from quantlab.generation import memory
from quantlab.generation.engine import Engine
from quantlab.generation.engines import load_engine, open_engine
from quantlab.generation.generator import Completion, complete
from quantlab.generation.native_engine import NativeEngine
from quantlab.generation.samples import complete_many
from quantlab.generation.sampling import SamplingParams

PROMPT = "The lamp in the boathouse"
SAMPLED = SamplingParams(temperature=1.2, top_k=0, top_p=1.0, min_p=0.0, seed=5)


@pytest.fixture(scope="module")
def tokenizer(llama_model: Path) -> Tokenizer:
    return load_tokenizer(llama_model)


def found(completion: Completion) -> tuple[object, ...]:
    """All of a completion but its timings."""
    return completion.text, completion.token_ids, completion.finish_reason, completion.engine


def check_samples(engine: Engine, tokenizer: Tokenizer, samples: int, params: SamplingParams, **settings) -> None:
    together = complete_many(engine, tokenizer, PROMPT, samples, params=params, **settings)
    for index, each in enumerate(together):
        alone = complete(engine, tokenizer, PROMPT, params=replace(params, seed=params.seed + index), **settings)
        assert found(each) == found(alone)
    assert len(together) == samples


@pytest.mark.parametrize("kind", ["native", "torch"])
def test_sample_i_is_the_completion_of_seed_plus_i(llama_model: Path, tokenizer: Tokenizer, kind: str) -> None:
    engine = open_engine(llama_model, kind)
    check_samples(engine, tokenizer, 4, SAMPLED, max_tokens=12)
    seeds = complete_many(engine, tokenizer, PROMPT, 4, max_tokens=12, params=SAMPLED)
    assert len({each.token_ids for each in seeds}) == 4
    assert engine.prefill(tokenizer.encode(PROMPT)) == len(tokenizer.encode(PROMPT)) - 1  # still cached


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.0},
        {"temperature": 0.5, "top_k": 5},
        {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.5, "penalty_window": 9},
        {"logit_bias": {300: 5.0}},
    ],
    ids=str,
)
def test_however_tokens_are_drawn(llama_model: Path, tokenizer: Tokenizer, changes: dict[str, object]) -> None:
    """Penalties look at the sample's own text."""
    check_samples(open_engine(llama_model), tokenizer, 3, replace(SAMPLED, **changes), max_tokens=20)


def test_samples_that_end_at_different_times(llama_model: Path, tokenizer: Tokenizer) -> None:
    """At an end token, at a stop string, at the limit: the others go on."""
    engine = open_engine(llama_model)
    params = replace(SAMPLED, logit_bias={2: 4.5})
    settings = {"max_tokens": 12, "stop": ["e"]}
    check_samples(engine, tokenizer, 12, params, **settings)
    ends = complete_many(engine, tokenizer, PROMPT, 12, params=params, **settings)
    assert len({len(each.token_ids) for each in ends}) > 3
    assert {each.finish_reason for each in ends} == {"stop", "length"}
    assert {each.token_ids[-1] == 2 for each in ends if each.finish_reason == "stop"} == {True, False}


@pytest.mark.parametrize("max_tokens", [1, 2, 500])
def test_limits(llama_model: Path, tokenizer: Tokenizer, max_tokens: int) -> None:
    """One token needs no branch; the context ends all samples alike."""
    engine = load_engine(llama_model, context=30)
    check_samples(engine, tokenizer, 3, replace(SAMPLED, logit_bias={2: -np.inf}), max_tokens=max_tokens)


@pytest.mark.parametrize("samples", [2, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_have_the_bits_of_each_alone(
    make_model: Callable[..., Path], tmp_path: Path, family: str, samples: int
) -> None:
    """Few samples and many, in every family, behind prompts that end in and at a tile; caches of all types."""
    make_model(tmp_path / "float", family, tied=FAMILIES[family].tied_by_default)
    quantize_checkpoint(tmp_path / "float", tmp_path / "packed")
    for kv, activations, prompt in (("f32", "f32", 16), ("f16", "int8", 37)):
        engine = load_engine(tmp_path / "packed", kv=kv, activations=activations, threads=2)
        check_logits(engine, prompt, samples, 9)


@pytest.mark.parametrize("kv", ["f16", "f32", "q8_0"])
def test_behind_a_prompt_of_several_chunks(make_model: Callable[..., Path], tmp_path: Path, kv: str) -> None:
    """Attention goes by 512 positions: branches that begin before a border and cross it."""
    make_model(tmp_path / "float", "llama", head_dim=32, max_position_embeddings=1200)
    quantize_checkpoint(tmp_path / "float", tmp_path / "packed")
    check_logits(load_engine(tmp_path / "packed", kv=kv, threads=2), 1017, 3, 10)


def check_logits(engine: NativeEngine, prompt: int, samples: int, length: int) -> None:
    """Branches that take tokens in turns and leave one by one, against the sequence continued by each alone."""
    rng = np.random.default_rng(prompt)
    prompt_ids = rng.integers(3, engine.vocabulary, prompt).tolist()
    tails = rng.integers(3, engine.vocabulary, (samples, length)).tolist()
    engine.prefill(prompt_ids)
    with engine.branches(samples, length) as branches:
        rows: list[list[np.ndarray]] = [[] for _ in tails]
        for step in range(length):
            live = [i for i in range(samples) if step < length - i]
            for i, row in zip(live, branches.append(live, [tails[i][step] for i in live]), strict=True):
                rows[i].append(row)
    assert engine.tokens == prompt_ids
    for tail, together in zip(tails, rows, strict=True):
        engine.rewind(prompt)
        alone = [engine.append_all([token])[0] for token in tail[: len(together)]]
        assert np.array_equal(together, alone)


class Letters:
    """A constraint: a token of few, and the end after five."""

    def __init__(self) -> None:
        self._left = 5

    @property
    def finished(self) -> bool:
        return not self._left

    def allowed(self) -> np.ndarray:
        allowed = np.zeros(512, bool)
        allowed[300:310] = True
        return allowed

    def take(self, token: int) -> None:
        assert 300 <= token < 310
        self._left -= 1


@pytest.mark.parametrize("kind", ["native", "torch"])
def test_each_sample_has_a_constraint_of_its_own(llama_model: Path, tokenizer: Tokenizer, kind: str) -> None:
    engine = open_engine(llama_model, kind)
    together = complete_many(engine, tokenizer, PROMPT, 3, params=SAMPLED, constraint=Letters)
    for index, each in enumerate(together):
        params = replace(SAMPLED, seed=SAMPLED.seed + index)
        assert found(each) == found(complete(engine, tokenizer, PROMPT, params=params, constraint=Letters()))
        assert (len(each.token_ids), each.finish_reason) == (5, "stop")


class Interrupted(Letters):
    """Ctrl-C at the third token."""

    def take(self, token: int) -> None:
        super().take(token)
        if self._left == 2:
            raise KeyboardInterrupt


def test_ctrl_c_leaves_the_prompt_cached(llama_model: Path, tokenizer: Tokenizer) -> None:
    engine = open_engine(llama_model)
    prompt_ids = tokenizer.encode(PROMPT)
    with pytest.raises(KeyboardInterrupt):
        complete_many(engine, tokenizer, PROMPT, 3, params=SAMPLED, constraint=Interrupted)
    assert engine.tokens == prompt_ids
    check_samples(engine, tokenizer, 3, SAMPLED, max_tokens=5)


def test_timings_tell_what_was_shared(llama_model: Path, tokenizer: Tokenizer) -> None:
    engine = open_engine(llama_model)
    count = len(tokenizer.encode(PROMPT))
    for cached in (0, count - 1):
        for each in complete_many(engine, tokenizer, PROMPT, 3, max_tokens=5, params=SAMPLED):
            timings = each.timings
            assert (timings.prompt_tokens, timings.cached_tokens) == (count, cached)
            assert timings.generated_tokens == len(each.token_ids)
            assert timings.prefill_tokens_per_second > 0 < timings.decode_tokens_per_second


@pytest.mark.parametrize(
    ("samples", "arguments", "message"),
    [
        (0, {}, "0 samples: at least one"),
        (65537, {}, "65537 samples: at most 65536 can be drawn"),
        (2, {"params": SamplingParams(seed=(1 << 64) - 1)}, "seed must be at least 0 and below"),
        (2, {"max_tokens": 0}, "at least one token must be asked for"),
        (2, {"stop": [""]}, "a stop string is empty"),
        (2, {"params": SamplingParams(logit_bias={512: 1.0})}, "token id 512 is outside"),
    ],
)
def test_samples_that_cannot_be_drawn(
    llama_model: Path, tokenizer: Tokenizer, samples: int, arguments: dict[str, object], message: str
) -> None:
    engine = open_engine(llama_model)
    with pytest.raises(InputError, match=message):
        complete_many(engine, tokenizer, PROMPT, samples, **arguments)
    assert engine.position == 0  # no prefill was paid for


def test_caches_that_do_not_fit_into_memory(
    llama_model: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine(llama_model)
    monkeypatch.setattr(memory, "available_memory", lambda: 10_000)
    with pytest.raises(InputError, match=r"1000 samples: .* needed for their caches, 1e-05 GB available; ask"):
        complete_many(engine, tokenizer, PROMPT, 1000)


def test_torch_has_no_branches(llama_model: Path) -> None:
    with pytest.raises(InputError, match="the torch engine computes one at a time"):
        open_engine(llama_model, "torch").branches(2, 5)
