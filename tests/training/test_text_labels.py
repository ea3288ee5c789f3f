"""Prompts with completions, and plain texts: exact ids and labels."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import byte_level

from quantlab import InputError, load_tokenizer
from quantlab.checkpoint.tokenizer import Tokenizer
from quantlab.training.row_forms import Completion
from quantlab.training.sample import NO_LOSS
from quantlab.training.text_labels import TextEncoder, completion_sample, text_samples, with_end_token

FABLE = Path(__file__).parents[2] / "models" / "fable-9m"
PROSE = Path(__file__).parents[1] / "data" / "prose.txt"


@lru_cache
def encoder(name: str) -> TextEncoder:
    """A SentencePiece BPE with a start token, or a byte-level one without."""
    return TextEncoder(load_tokenizer(FABLE) if name == "fable" else byte_level(PROSE, eos="<|endoftext|>"))


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    return [tokenizer.backend.id_to_token(i) for i in ids]


def test_a_completion_goes_on_where_the_prompt_ends() -> None:
    """Behind a prompt SentencePiece's space at the beginning of a text would be a space that nobody wrote."""
    fable = encoder("fable")
    joined = completion_sample(Completion("The sea", "son."), fable, "here")
    spaced = completion_sample(Completion("The sea", " son."), fable, "here")
    assert fable.tokenizer.decode(joined.input_ids) == "The season."
    assert fable.tokenizer.decode(spaced.input_ids) == "The sea son."
    prompt = fable.tokenizer.encode("The sea")
    assert prompt[0] == 1
    for sample in (joined, spaced):
        assert sample.input_ids[: len(prompt)] == prompt
        assert sample.labels == [NO_LOSS] * len(prompt) + sample.input_ids[len(prompt) :]
        assert sample.input_ids[-1] == sample.labels[-1] == 2
        assert sample.as_served is True
    assert not pieces(fable.tokenizer, joined.trained)[0].startswith("\u2581")
    assert pieces(fable.tokenizer, spaced.trained)[0].startswith("\u2581")


def test_the_ids_are_those_of_the_parts_in_byte_level_bpe() -> None:
    """Where the whole text would be cut otherwise, the prompt keeps the ids that generation gives it."""
    bytes_ = encoder("bytes")
    tokenizer = bytes_.tokenizer
    prompt, completion = tokenizer.encode("the "), tokenizer.encode("other")
    assert [*prompt, *completion] != tokenizer.encode("the other")
    sample = completion_sample(Completion("the ", "other"), bytes_, "here")
    assert sample.input_ids == [*prompt, *completion, 0]
    assert sample.labels == [*[NO_LOSS] * len(prompt), *completion, 0]


def test_the_prompt_learns_too_if_asked() -> None:
    fable = encoder("fable")
    sample = completion_sample(Completion("The sea", " is."), fable, "here", completion_only=False)
    assert sample.labels == [NO_LOSS, *sample.input_ids[1:]]


def test_an_end_that_is_written_out_is_not_doubled() -> None:
    sample = completion_sample(Completion("a", " b</s>"), encoder("fable"), "here")
    assert sample.input_ids.count(2) == 1


def test_an_empty_prompt_is_the_beginning_of_a_text() -> None:
    fable, bytes_ = encoder("fable"), encoder("bytes")
    text = fable.tokenizer.encode("It rained.")
    assert completion_sample(Completion("", "It rained."), fable, "here").input_ids == [*text, 2]
    first, *rest = bytes_.tokenizer.encode("It rained.")
    sample = completion_sample(Completion("", "It rained."), bytes_, "here")
    assert sample.input_ids == [first, *rest, 0]
    assert sample.labels == [NO_LOSS, *rest, 0]  # nothing precedes the first


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(["fable", "bytes"]),
    prompt=st.text(st.sampled_from("aeT .,\n\t19\u00e9\u4e2d\U0001f600\u2581'"), min_size=1, max_size=12),
    completion=st.text(st.sampled_from("aeT .,\n\t19\u00e9\u4e2d\U0001f600\u2581'"), min_size=1, max_size=12),
)
def test_any_prompt_and_completion(name: str, prompt: str, completion: str) -> None:
    """The prompt's ids are generation's, the rest carries loss, and together they are the text.

    SentencePiece's sign for a space is one when it is read back, whoever wrote it.
    """
    texts = encoder(name)
    sample = completion_sample(Completion(prompt, completion), texts, "here")
    served = texts.tokenizer.encode(prompt)
    assert sample.input_ids[: len(served)] == served
    assert all(label in (NO_LOSS, i) for label, i in zip(sample.labels, sample.input_ids, strict=True))
    assert sample.labels == [NO_LOSS] * len(served) + sample.input_ids[len(served) :]
    text = prompt + completion
    assert texts.tokenizer.decode(sample.input_ids) == (text.replace("\u2581", " ") if name == "fable" else text)
    assert sample.labels[-1] == texts.end
    if name == "bytes":
        assert texts.tokenizer.decode(sample.trained) == completion


@pytest.mark.parametrize("context", [4, 7, 64])
def test_windows_of_a_text_with_a_start_token(context: int) -> None:
    fable = encoder("fable")
    ids = [*fable.tokenizer.encode("Once upon a time there was a fox who wrote.", add_special_tokens=False), 2]
    samples = text_samples("Once upon a time there was a fox who wrote.", fable, "here", context)
    assert [i for sample in samples for i in sample.trained] == ids
    assert all(s.input_ids == [1, *s.trained] and len(s.input_ids) <= context for s in samples)
    assert all(len(s.input_ids) == context for s in samples[:-1])
    assert {s.as_served for s in samples} == {None}


@pytest.mark.parametrize("context", [2, 5, 64])
def test_windows_of_a_text_without_one(context: int) -> None:
    """Each begins with the last token of the one before, so that none but the text's first goes without loss."""
    bytes_ = encoder("bytes")
    text = "Once upon a time there was a fox."
    ids = [*bytes_.tokenizer.encode(text), 0]
    samples = text_samples(text, bytes_, "here", context)
    assert [i for sample in samples for i in sample.trained] == ids[1:]
    assert samples[0].input_ids[0] == ids[0]
    assert all(a.input_ids[-1] == b.input_ids[0] for a, b in pairwise(samples))
    assert all(len(s.input_ids) == context for s in samples[:-1])


def test_a_start_token_that_is_written_out_is_not_doubled() -> None:
    (sample,) = text_samples("<s>It rained.", encoder("fable"), "here", 64)
    assert sample.input_ids.count(1) == 1


def test_a_tokenizer_without_an_end_token() -> None:
    endless = byte_level(PROSE, eos=None)
    with pytest.raises(InputError, match=r"has no end token.*eos_token_id"):
        TextEncoder(endless)
    named = with_end_token(endless, "<|im_end|>")
    assert TextEncoder(named).end == named.backend.token_to_id("<|im_end|>")
    with pytest.raises(InputError, match="no such token"):
        with_end_token(endless, "<|none|>")
