"""The decoding loop: what a constraint allows, where it ends, and what an interruption leaves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from quantlab.checkpoint import load_tokenizer
from quantlab.errors import InputError
from quantlab.generation.generator import complete
from quantlab.generation.native_engine import NativeEngine, load_native
from quantlab.generation.sampling import SamplingParams
from quantlab.generation.torch_engine import TorchEngine
from quantlab.loading import load_model

PROMPT = [1, 300, 45, 7, 411]
SAMPLED = SamplingParams(temperature=1.2, seed=3)


class Forced:
    """A constraint that copies a text, `width` tokens being allowed at each place."""

    def __init__(self, text: Sequence[int], width: int = 1) -> None:
        self.text, self.width, self.taken = list(text), width, []

    @property
    def finished(self) -> bool:
        return len(self.taken) == len(self.text)

    def allowed(self) -> np.ndarray:
        mask = np.zeros(512, bool)
        first = self.text[len(self.taken)]
        mask[first : first + self.width] = True
        return mask

    def take(self, token: int) -> None:
        assert self.allowed()[token]
        self.taken.append(token)


@pytest.fixture
def engine(llama_model: Path) -> NativeEngine:
    return load_native(llama_model, threads=1)


# Constraints.


def test_a_constraint_decides_what_comes_and_where_it_ends(engine: NativeEngine) -> None:
    text = [5, 500, 17, 17, 3]
    forced = Forced(text)
    engine.prefill(PROMPT)
    assert list(engine.decode(SAMPLED, 100, forced)) == text == forced.taken
    assert engine.tokens == [*PROMPT, *text[:-1]]


def test_of_what_is_allowed_the_sampler_draws(engine: NativeEngine) -> None:
    """The token is that of the same sampler for logits without the others."""
    engine.prefill(PROMPT)
    drawn = list(engine.decode(SamplingParams(temperature=0), 8, Forced([100] * 8, 300)))
    for place, token in enumerate(drawn):
        engine.prefill([*PROMPT, *drawn[:place]])
        assert token == 100 + int(engine.logits()[100:400].argmax())
    assert len(set(drawn)) > 2


def test_a_constraint_that_allows_nothing_is_told_of(engine: NativeEngine) -> None:
    engine.prefill(PROMPT)
    with pytest.raises(InputError, match="the constraint allows no token"):
        list(engine.decode(SAMPLED, 5, Forced([3, 4], 0)))


def test_a_completion_stops_where_its_constraint_is_complete(engine: NativeEngine, llama_model: Path) -> None:
    """Also at the last token that was asked for; earlier it is cut."""
    tokenizer = load_tokenizer(llama_model)
    text = tokenizer.encode("The lamp was lit", add_special_tokens=False)
    for most, reason in [(len(text) + 5, "stop"), (len(text), "stop"), (len(text) - 1, "length")]:
        completion = complete(engine, tokenizer, "One day.", max_tokens=most, constraint=Forced(text))
        assert completion.finish_reason == reason
        assert completion.token_ids == tuple(text[:most])
    assert "The lamp was lit".startswith(completion.text.strip())


def test_token_ids_are_a_prompt_as_they_are(engine: NativeEngine, llama_model: Path) -> None:
    """No start token is added; numpy's integers will do."""
    tokenizer = load_tokenizer(llama_model)
    ids = tokenizer.encode("The lamp in the boathouse")
    expected = complete(engine, tokenizer, "The lamp in the boathouse", max_tokens=9, params=SAMPLED)
    for prompt in (ids, tuple(ids), np.array(ids)):
        given = complete(engine, tokenizer, prompt, max_tokens=9, params=SAMPLED)
        assert (given.text, given.token_ids) == (expected.text, expected.token_ids)
    with pytest.raises(InputError, match="token id 512 is outside"):
        complete(engine, tokenizer, [1, 512])


# Interruptions.


class Interrupting:
    """Stands in for a decoder whose caller is interrupted as soon as the `countdown`-th pass is done."""

    def __init__(self, decoder, countdown: int) -> None:
        self._decoder, self._countdown = decoder, countdown

    def append(self, *arguments) -> None:
        self._decoder.append(*arguments)
        self._countdown -= 1
        if not self._countdown:
            raise KeyboardInterrupt

    def __getattr__(self, name: str):
        return getattr(self._decoder, name)


@pytest.mark.parametrize("countdown", [1, 2, 3, 6])
def test_ctrl_c_leaves_tokens_and_cache_alike(engine: NativeEngine, llama_model: Path, countdown: int) -> None:
    """The pass was computed, but nobody counted its tokens: another text goes on from the shared beginning."""
    engine._decoder = Interrupting(engine._decoder, countdown)
    with pytest.raises(KeyboardInterrupt):
        complete(engine, load_tokenizer(llama_model), PROMPT, max_tokens=20, params=SAMPLED)
    other = [*engine.tokens, 77, 78, 79]
    assert engine.prefill(other) == len(other) - 3
    assert np.array_equal(engine.logits(), load_native(llama_model, threads=1).logits_of(other)[-1])


def test_ctrl_c_within_a_pass_of_torch_begins_anew(llama_model: Path) -> None:
    """Some layers have taken the token, others have not."""
    engine = TorchEngine(load_model(llama_model))
    engine.prefill(PROMPT)

    def interrupted(*_) -> None:
        raise KeyboardInterrupt

    hook = engine.model.model.layers[1].register_forward_pre_hook(interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(engine.decode(SAMPLED, 5))
    hook.remove()
    assert engine.prefill([*PROMPT, 9]) == 0
    fresh = TorchEngine(load_model(llama_model))
    fresh.prefill([*PROMPT, 9])
    assert torch.equal(torch.tensor(engine.logits()), torch.tensor(fresh.logits()))


def test_a_reader_that_raises_ends_the_decoding(engine: NativeEngine, llama_model: Path) -> None:
    """Ctrl-C while a piece is printed: the sequence is prompt and tokens so far."""

    def reader(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        complete(engine, load_tokenizer(llama_model), PROMPT, max_tokens=20, params=SAMPLED, on_text=reader)
    assert engine.tokens[: len(PROMPT)] == PROMPT
    assert engine.prefill([*PROMPT, 500]) == len(PROMPT)
