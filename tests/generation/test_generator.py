"""From prompt to text: what is streamed, where it stops, and what is told about it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import quantlab
from quantlab.checkpoint import Tokenizer, load_tokenizer
from quantlab.errors import InputError
from quantlab.generation.generator import complete
from quantlab.generation.sampling import SamplingParams
from quantlab.generation.text_stream import TextStream
from quantlab.generation.torch_engine import TorchEngine
from quantlab.loading import load_model
from quantlab.training.corpus import read_documents

GREEDY = SamplingParams(temperature=0)
SAMPLED = SamplingParams(temperature=1.2, top_k=40, top_p=1.0, min_p=0.0, seed=3)
PROMPT = "The lamp in the boathouse"


@pytest.fixture(scope="module")
def folder(make_model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama that writes words: special and byte tokens have zero logits, which are never among the likeliest."""
    folder = make_model(tmp_path_factory.mktemp("words"), "llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][:259] = 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


@pytest.fixture
def engine(folder: Path) -> TorchEngine:
    return TorchEngine(load_model(folder))


# The text.


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_the_text_is_that_of_the_tokens(engine: TorchEngine, tokenizer: Tokenizer, params: SamplingParams) -> None:
    """Decoded behind the prompt, of which it is the continuation; the engine's own tokens, in its order."""
    completion = complete(engine, tokenizer, PROMPT, max_tokens=40, params=params)
    prompt_ids = tokenizer.encode(PROMPT)
    assert tokenizer.decode([*prompt_ids, *completion.token_ids]) == PROMPT + completion.text
    engine.prefill(prompt_ids)
    assert completion.token_ids == tuple(engine.decode(params, 40))
    assert (completion.finish_reason, completion.engine) == ("length", "torch")


def test_the_library_function_does_the_same(folder: Path, engine: TorchEngine, tokenizer: Tokenizer) -> None:
    """`quantlab.generate` loads the folder and completes the prompt."""
    pieces: list[str] = []
    completion = quantlab.generate(
        folder, PROMPT, max_tokens=12, params=SAMPLED, stop=["zzz"], on_text=pieces.append, engine="torch"
    )
    expected = complete(engine, tokenizer, PROMPT, max_tokens=12, params=SAMPLED)
    assert (completion.text, completion.token_ids) == (expected.text, expected.token_ids)
    assert "".join(pieces) == completion.text


def test_generation_is_reproducible_by_default(engine: TorchEngine, tokenizer: Tokenizer) -> None:
    """Seed 0 unless another is asked for."""
    completion = complete(engine, tokenizer, PROMPT, max_tokens=20)
    assert completion.token_ids == complete(engine, tokenizer, PROMPT, max_tokens=20).token_ids
    other = complete(engine, tokenizer, PROMPT, max_tokens=20, params=SamplingParams(seed=1))
    assert completion.token_ids != other.token_ids


def test_pieces_join_to_the_text(engine: TorchEngine, tokenizer: Tokenizer) -> None:
    """Each is new text, none is empty."""
    pieces: list[str] = []
    completion = complete(engine, tokenizer, PROMPT, max_tokens=60, params=SAMPLED, on_text=pieces.append)
    assert "".join(pieces) == completion.text
    assert all(pieces)
    assert len(pieces) > 30


def test_a_word_in_the_middle_of_a_sentence_begins_with_its_space(tokenizer: Tokenizer) -> None:
    """SentencePiece's decoder leaves the first space of a text out; a continuation is not the first."""
    whole = tokenizer.encode("The lamp was lit")
    prompt = tokenizer.encode("The lamp")
    assert whole[: len(prompt)] == prompt
    assert "".join(streamed(tokenizer, prompt, whole[len(prompt) :])) == " was lit"
    assert "".join(streamed(tokenizer, [tokenizer.bos], whole[1:])) == "The lamp was lit"
    assert "".join(streamed(tokenizer, [], whole[1:])) == "The lamp was lit"


def streamed(
    tokenizer: Tokenizer, prompt_ids: Sequence[int], token_ids: Sequence[int], stop: Sequence[str] = ()
) -> list[str]:
    """The pieces in which a stream releases `token_ids`."""
    pieces: list[str] = []
    stream = TextStream(tokenizer, prompt_ids, stop, pieces.append)
    for token in token_ids:
        if stream.add(token, is_end=False):
            break
    stream.flush()
    assert stream.text == "".join(pieces)
    return pieces


def test_the_prose_streams_whole_from_wherever_it_begins(tokenizer: Tokenizer, prose: Path) -> None:
    """Split between any two tokens, the stream gives exactly what follows."""
    for document in read_documents(prose):
        text = document[:300]
        ids = tokenizer.encode(text)
        for split in range(1, len(ids), 5):
            before = tokenizer.decode(ids[:split])
            assert before + "".join(streamed(tokenizer, ids[:split], ids[split:])) == text


TEXT = st.text(st.sampled_from("ab \n.\u00e9\u65e5\u672c\U0001f600\U0001f680\u200d"), max_size=12)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(prompt=TEXT, continuation=TEXT)
def test_characters_without_a_token_are_never_streamed_by_halves(
    tokenizer: Tokenizer, prompt: str, continuation: str
) -> None:
    """Nor are those spoiled that end the prompt: they too are several byte tokens."""
    ids = tokenizer.encode(prompt + continuation)
    prompt_ids = tokenizer.encode(prompt)
    if ids[: len(prompt_ids)] != prompt_ids:  # the two texts share a token where they meet
        prompt_ids, prompt, continuation = ids[:1], "", prompt + continuation
    pieces = streamed(tokenizer, prompt_ids, ids[len(prompt_ids) :])
    assert "".join(pieces) == continuation
    assert "\ufffd" not in "".join(pieces)


def test_an_emoji_appears_with_its_last_byte(tokenizer: Tokenizer) -> None:
    """Four byte tokens: three give nothing, the fourth the whole character."""
    ids = tokenizer.encode("a\U0001f600", add_special_tokens=False)
    smile = [tokenizer.backend.token_to_id(f"<0x{byte:02X}>") for byte in "\U0001f600".encode()]
    assert ids[-4:] == smile
    pieces: list[str] = []
    stream = TextStream(tokenizer, tokenizer.encode("a"), (), pieces.append)
    seen = []
    for token in smile + smile:
        stream.add(token, is_end=False)
        seen.append(list(pieces))
    one, two = ["\U0001f600"], ["\U0001f600", "\U0001f600"]
    assert seen == [[], [], [], one, one, one, one, two]


def test_bytes_that_are_no_character_are_shown_as_such(tokenizer: Tokenizer) -> None:
    """At the end, or when a token follows that cannot complete them; characters before them stay."""
    smile = [tokenizer.backend.token_to_id(f"<0x{byte:02X}>") for byte in "\U0001f600".encode()]
    letter = tokenizer.backend.token_to_id("a")
    prompt = tokenizer.encode("a")
    assert "".join(streamed(tokenizer, prompt, smile[:2])) == "\ufffd\ufffd"
    assert "".join(streamed(tokenizer, prompt, [*smile[:2], letter])) == "\ufffd\ufffda"
    assert "".join(streamed(tokenizer, prompt, [*smile, *smile[:2]])) == "\U0001f600\ufffd\ufffd"
    assert "".join(streamed(tokenizer, prompt, [*smile, smile[3], letter])) == "\U0001f600\ufffda"


# Where it ends.


def test_max_tokens_ends_a_text(engine: TorchEngine, tokenizer: Tokenizer) -> None:
    for count in (1, 2, 17):
        completion = complete(engine, tokenizer, PROMPT, max_tokens=count, params=GREEDY)
        assert (len(completion.token_ids), completion.finish_reason) == (count, "length")


def test_the_context_ends_a_text(folder: Path, tokenizer: Tokenizer) -> None:
    """One token more than the places that are left."""
    room = 6
    engine = TorchEngine(load_model(folder), context=len(tokenizer.encode(PROMPT)) + room)
    completion = complete(engine, tokenizer, PROMPT, max_tokens=100, params=GREEDY)
    assert (len(completion.token_ids), completion.finish_reason) == (room + 1, "length")


def test_an_end_token_ends_a_text_and_is_no_part_of_it(engine: TorchEngine, tokenizer: Tokenizer) -> None:
    """It is a part of the token ids. Here the sixth token of a known continuation is declared one."""
    known = complete(engine, tokenizer, PROMPT, max_tokens=20, params=SAMPLED)
    end = known.token_ids[5]
    assert end not in known.token_ids[:5]
    ending = Tokenizer(tokenizer.backend, tokenizer.bos, frozenset({end}))
    pieces: list[str] = []
    completion = complete(engine, ending, PROMPT, max_tokens=20, params=SAMPLED, on_text=pieces.append)
    assert completion.token_ids == known.token_ids[:6]
    assert completion.finish_reason == "stop"
    prompt_ids = tokenizer.encode(PROMPT)
    assert PROMPT + completion.text == tokenizer.decode([*prompt_ids, *known.token_ids[:5]])
    assert "".join(pieces) == completion.text


@pytest.mark.parametrize(("begin", "length"), [(0, 1), (0, 5), (3, 1), (7, 3), (10, 9), (20, 25)])
def test_a_stop_string_ends_a_text_and_is_no_part_of_it(
    engine: TorchEngine, tokenizer: Tokenizer, begin: int, length: int
) -> None:
    """Anywhere in a known continuation: at its start, within a token, across many; later tokens are not drawn."""
    known = complete(engine, tokenizer, PROMPT, max_tokens=40, params=SAMPLED)
    stop = known.text[begin : begin + length]
    pieces: list[str] = []
    completion = complete(
        engine, tokenizer, PROMPT, max_tokens=40, params=SAMPLED, stop=["\x00", stop], on_text=pieces.append
    )
    assert completion.text == known.text[: known.text.index(stop)] == "".join(pieces)
    assert completion.finish_reason == "stop"
    drawn = len(completion.token_ids)
    assert completion.token_ids == known.token_ids[:drawn]
    prompt_ids = tokenizer.encode(PROMPT)
    assert stop in tokenizer.decode([*prompt_ids, *known.token_ids[:drawn]])[len(PROMPT) :]
    assert stop not in tokenizer.decode([*prompt_ids, *known.token_ids[: drawn - 1]])[len(PROMPT) :]


def letters(tokenizer: Tokenizer, text: str) -> list[int]:
    """One token for each letter."""
    ids = [tokenizer.backend.token_to_id(letter) for letter in text]
    assert None not in ids
    return ids


@pytest.mark.parametrize(
    ("text", "stop", "pieces"),
    [
        ("abcd", [], ["a", "b", "c", "d"]),
        ("abcd", ["cd"], ["a", "b"]),
        ("abce", ["cd"], ["a", "b", "ce"]),  # c waits for what follows
        ("abc", ["cd"], ["a", "b", "c"]),  # nothing follows
        ("ccd", ["cd"], ["c"]),  # the second c may be the beginning
        ("aab", ["aaab"], ["aab"]),
        ("aaaab", ["aaab"], ["a"]),
        ("abcabd", ["abd"], ["abc"]),
        ("abcde", ["bcx", "cdx", "e"], ["a", "b", "cd"]),  # b as soon as no stop string can hold it
        ("abc", ["bc", "abc"], []),  # the one that begins first
        ("abc", ["c", "bc"], ["a"]),
        ("xay", ["a"], ["x"]),
    ],
)
def test_text_that_may_be_the_beginning_of_a_stop_string_is_held_back(
    tokenizer: Tokenizer, text: str, stop: list[str], pieces: list[str]
) -> None:
    """Worked examples of one letter per token."""
    seen = streamed(tokenizer, tokenizer.encode("a"), letters(tokenizer, text), stop)
    assert "".join(seen) == "".join(pieces)
    assert seen == pieces


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    text=st.text(st.sampled_from("ab"), max_size=12),
    stop=st.lists(st.text(st.sampled_from("ab"), min_size=1, max_size=4), max_size=3),
)
def test_a_text_is_cut_at_the_first_stop_string_that_is_complete(
    tokenizer: Tokenizer, text: str, stop: list[str]
) -> None:
    """The specification in two lines: take letters until a stop string is there, and cut where the first one begins."""
    ends = [end for end in range(1, len(text) + 1) if any(string in text[:end] for string in stop)]
    seen = text[: ends[0]] if ends else text
    expected = seen[: min((seen.index(string) for string in stop if string in seen), default=len(seen))]
    assert "".join(streamed(tokenizer, tokenizer.encode("a"), letters(tokenizer, text), stop)) == expected


# What is told.


def test_timings_count_tokens(engine: TorchEngine, tokenizer: Tokenizer) -> None:
    """A second prompt with the same beginning finds it cached."""
    prompt_ids = tokenizer.encode(PROMPT)
    first = complete(engine, tokenizer, PROMPT, max_tokens=5, params=GREEDY)
    assert first.timings.prompt_tokens == len(prompt_ids)
    assert first.timings.cached_tokens == 0
    assert first.timings.generated_tokens == len(first.token_ids) == 5
    again = complete(engine, tokenizer, PROMPT, max_tokens=3, params=GREEDY)
    assert again.timings.cached_tokens == len(prompt_ids) - 1
    assert again.timings.generated_tokens == 3
    assert again.token_ids == first.token_ids[:3]
    for timings in (first.timings, again.timings):
        for speed in (timings.prefill_tokens_per_second, timings.decode_tokens_per_second):
            assert 0 < speed < math.inf


# What is refused.


@pytest.mark.parametrize("count", [0, -1])
def test_no_tokens_cannot_be_asked_for(engine: TorchEngine, tokenizer: Tokenizer, count: int) -> None:
    with pytest.raises(InputError, match="at least one token must be asked for"):
        complete(engine, tokenizer, PROMPT, max_tokens=count)


def test_an_empty_stop_string_is_refused(engine: TorchEngine, tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="a stop string is empty"):
        complete(engine, tokenizer, PROMPT, stop=["a", ""])


def test_a_prompt_longer_than_the_context_is_refused(engine: TorchEngine, tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=r"the prompt has \d+ tokens; the context holds 128"):
        complete(engine, tokenizer, PROMPT * 40)


def test_an_empty_prompt_needs_a_start_token(engine: TorchEngine, tokenizer: Tokenizer) -> None:
    """With one, the model begins a text; without, there is nothing to go on from."""
    completion = complete(engine, tokenizer, "", max_tokens=4, params=GREEDY)
    assert completion.text == tokenizer.decode(completion.token_ids)
    assert completion.timings.prompt_tokens == 1
    with pytest.raises(InputError, match="the prompt holds no token"):
        complete(engine, Tokenizer(tokenizer.backend, None, frozenset()), "", max_tokens=4)


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{tmp_path}: holds no tokenizer"):
        quantlab.generate(tmp_path, PROMPT)


def test_torch_keeps_its_own_random_state(engine: TorchEngine, tokenizer: Tokenizer) -> None:
    """Generating draws from no global generator."""
    state = torch.get_rng_state()
    complete(engine, tokenizer, PROMPT, max_tokens=5, params=SAMPLED)
    assert torch.equal(torch.get_rng_state(), state)
