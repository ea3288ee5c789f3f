"""The torch engine: transformers' own tokens and logits, however the sequence came to be."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

import quantlab
from quantlab.errors import InputError
from quantlab.generation.sampling import SamplingParams
from quantlab.generation.torch_engine import TorchEngine
from quantlab.loading import load_model

GREEDY = SamplingParams(temperature=0)
PROMPT = [1, 300, 45, 7, 411, 260, 99, 500, 12, 45]
# Products of matrices of other shapes add up in another order, which changes logits by some 1e-6 of the largest.
TOLERANCE = 1e-4


@pytest.fixture
def model(float_model: Path):
    """A tiny model of each family, tied and untied, loaded anew."""
    return load_model(float_model)


def assert_logits_follow(engine: TorchEngine, token_ids: list[int]) -> None:
    """The engine's logits are those of one fresh forward pass over `token_ids`."""
    with torch.inference_mode():
        expected = engine.model(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0, -1].numpy()
    assert engine.tokens == token_ids
    assert engine.position == len(token_ids)
    assert engine.logits().dtype == np.float32
    assert engine.logits().shape == expected.shape
    assert np.abs(engine.logits() - expected).max() <= TOLERANCE * np.abs(expected).max()


def greedy_by_transformers(model, token_ids: list[int], count: int) -> list[int]:
    model.generation_config.eos_token_id = None  # the engine itself ends at no token
    model.generation_config.pad_token_id = 0
    output = model.generate(torch.tensor([token_ids]), do_sample=False, max_new_tokens=count)
    return output[0, len(token_ids) :].tolist()


def watch_passes(model) -> list[int]:
    """A list that grows by the number of tokens of every forward pass."""
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda _, __, inputs: sizes.append(inputs["input_ids"].shape[1]), with_kwargs=True)
    return sizes


# Decoding.


def test_greedy_tokens_are_those_of_transformers(model) -> None:
    """40 tokens of `model.generate(do_sample=False)`."""
    engine = TorchEngine(model)
    assert engine.prefill(PROMPT) == 0
    assert list(engine.decode(GREEDY, 40)) == greedy_by_transformers(model, PROMPT, 40)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_greedy_tokens_of_a_quantized_model_are_those_of_transformers(make_model, tmp_path: Path, family: str) -> None:
    quantlab.quantize_checkpoint(make_model(tmp_path / "float", family), tmp_path / "packed", format="q4_1")
    model = load_model(tmp_path / "packed")
    engine = TorchEngine(model)
    engine.prefill(PROMPT)
    assert list(engine.decode(GREEDY, 40)) == greedy_by_transformers(model, PROMPT, 40)


def test_the_last_drawn_token_is_not_computed_with(model) -> None:
    """Its logits are nobody's wish yet; prefilling the whole text again computes it alone."""
    engine = TorchEngine(model)
    engine.prefill(PROMPT)
    drawn = list(engine.decode(GREEDY, 5))
    assert engine.tokens == [*PROMPT, *drawn[:-1]]
    assert engine.prefill([*PROMPT, *drawn]) == len(PROMPT) + 4
    assert_logits_follow(engine, [*PROMPT, *drawn])


def test_decoding_may_stop_at_any_token(model) -> None:
    """Whoever stops asking has computed with what came before the last token, and may decode on."""
    engine = TorchEngine(model)
    engine.prefill(PROMPT)
    expected = list(engine.decode(GREEDY, 8))
    engine.prefill(PROMPT)
    first = list(itertools.islice(engine.decode(GREEDY, 8), 3))
    assert first == expected[:3]
    assert_logits_follow(engine, [*PROMPT, *first[:-1]])
    engine.prefill([*PROMPT, *first])
    assert list(engine.decode(GREEDY, 5)) == expected[3:]


def test_sampled_tokens_depend_on_seed_and_text_alone(model) -> None:
    """Not on what the engine did before; another seed gives another text."""
    params = SamplingParams(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=5)
    fresh, used = TorchEngine(model), TorchEngine(model)
    used.prefill(PROMPT[:4])
    list(used.decode(params, 7))
    fresh.prefill(PROMPT)
    used.prefill(PROMPT)
    expected = list(fresh.decode(params, 20))
    assert list(used.decode(params, 20)) == expected
    fresh.prefill(PROMPT)
    other = SamplingParams(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=6)
    assert list(fresh.decode(other, 20)) != expected


def test_the_repetition_penalty_sees_prompt_and_generated_tokens(model) -> None:
    """transformers' does, too."""
    engine = TorchEngine(model)
    engine.prefill(PROMPT)
    drawn = list(engine.decode(SamplingParams(temperature=0, repetition_penalty=3.0), 30))
    model.generation_config.repetition_penalty = 3.0
    assert drawn == greedy_by_transformers(model, PROMPT, 30)


# Prefilling.


@pytest.mark.parametrize("chunk", [1, 3, 9, 10, 1000, None])
def test_a_prompt_may_be_computed_in_chunks(model, chunk: int | None) -> None:
    """Of any size, the last one smaller."""
    engine = TorchEngine(model)
    assert engine.prefill(PROMPT, chunk) == 0
    assert_logits_follow(engine, PROMPT)


def test_chunks_bound_what_is_computed_at_once(model) -> None:
    """No forward pass sees more tokens than asked."""
    sizes = watch_passes(model)
    TorchEngine(model).prefill(PROMPT, 4)
    assert sizes == [4, 4, 2]


@pytest.mark.parametrize(
    ("then", "cached"),
    [
        ([*PROMPT, 5, 6], 10),  # longer
        (PROMPT, 9),  # equal: the last token runs again, its logits are wanted
        (PROMPT[:6], 5),  # shorter
        (PROMPT[:1], 0),
        ([*PROMPT[:5], 8, 8, 8], 5),  # another end
        ([2, *PROMPT[1:]], 0),  # another beginning
    ],
    ids=["longer", "equal", "shorter", "first token", "another end", "another beginning"],
)
def test_the_common_prefix_is_not_computed_again(model, then: list[int], cached: int) -> None:
    """Its length is told, and logits are those of the whole new prompt."""
    engine = TorchEngine(model)
    engine.prefill(PROMPT)
    sizes = watch_passes(model)
    assert engine.prefill(then) == cached
    assert sum(sizes) == len(then) - cached
    assert_logits_follow(engine, then)


@pytest.mark.parametrize("position", [0, 1, 6, 9])
def test_a_rewound_sequence_goes_on_elsewhere(model, position: int) -> None:
    """Tokens before the position stay cached, those behind it leave no trace."""
    engine = TorchEngine(model)
    engine.prefill(PROMPT)
    engine.rewind(position)
    assert engine.tokens == PROMPT[:position]
    then = [*PROMPT[:position], 77, 78]
    assert engine.prefill(then) == position
    assert_logits_follow(engine, then)


def test_rewinding_to_the_end_changes_nothing(model) -> None:
    engine = TorchEngine(model)
    engine.prefill(PROMPT)
    engine.rewind(len(PROMPT))
    assert_logits_follow(engine, PROMPT)


def test_many_turns_leave_no_trace(model) -> None:
    """Prefill, decode, rewind and prefill again, a hundred times in a fixed random order."""
    generator = np.random.default_rng(0)
    engine = TorchEngine(model)
    for _ in range(100):
        keep = int(generator.integers(0, engine.position + 1))
        new = generator.integers(0, 512, generator.integers(1, 12)).tolist()
        text = [*engine.tokens[:keep], *new][-40:]
        engine.prefill(text, int(generator.integers(1, 15)))
        list(engine.decode(GREEDY, int(generator.integers(1, 4))))
    assert_logits_follow(engine, list(engine.tokens))


# The context.


def test_the_context_is_the_models_unless_a_smaller_one_is_asked(model) -> None:
    assert TorchEngine(model).context == 128
    assert TorchEngine(model, context=16).context == 16
    assert TorchEngine(model, context=1000).context == 128


def test_decoding_ends_where_the_context_does(model) -> None:
    """The last place holds a token that was computed with; one more comes out of it."""
    engine = TorchEngine(model, context=16)
    engine.prefill(PROMPT)
    drawn = list(engine.decode(GREEDY, 100))
    assert drawn == greedy_by_transformers(model, PROMPT, 7)
    assert engine.position == 16


def test_a_prompt_may_fill_the_context(model) -> None:
    """To the model's own limit: one token can follow."""
    prompt = (PROMPT * 13)[:128]
    engine = TorchEngine(model)
    engine.prefill(prompt)
    assert_logits_follow(engine, prompt)
    assert list(engine.decode(GREEDY, 5)) == [int(engine.logits().argmax())]


# What is refused; the sequence stays what it was.


@pytest.mark.parametrize(
    ("token_ids", "message"),
    [
        ([], "the prompt holds no token"),
        ([1, -1], "token id -1 is outside the vocabulary of 512"),
        ([1, 512], "token id 512 is outside the vocabulary of 512"),
        ([1] * 17, "the prompt has 17 tokens; the context holds 16"),
    ],
    ids=["empty", "negative", "too large", "too long"],
)
def test_a_wrong_prompt_is_refused(model, token_ids: list[int], message: str) -> None:
    engine = TorchEngine(model, context=16)
    engine.prefill(PROMPT)
    with pytest.raises(InputError) as caught:
        engine.prefill(token_ids)
    assert str(caught.value) == message
    assert_logits_follow(engine, PROMPT)


@pytest.mark.parametrize("chunk", [0, -1])
def test_a_chunk_of_no_tokens_is_refused(model, chunk: int) -> None:
    engine = TorchEngine(model)
    with pytest.raises(InputError, match=f"chunk {chunk}: at least 1 token is needed"):
        engine.prefill(PROMPT, chunk)


@pytest.mark.parametrize("position", [-1, 11])
def test_a_position_that_the_sequence_does_not_have_is_refused(model, position: int) -> None:
    engine = TorchEngine(model)
    engine.prefill(PROMPT)
    with pytest.raises(InputError, match=f"position {position}: the sequence has 10 tokens"):
        engine.rewind(position)
    assert_logits_follow(engine, PROMPT)
