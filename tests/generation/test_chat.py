"""A chat with a tiny model: what is answered, kept, counted, and how it goes on after an interrupt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from quantlab import InputError, load_engine, load_tokenizer
from quantlab.checkpoint import Tokenizer
from quantlab.generation.chat import Chat
from quantlab.generation.chat_layout import chat_layout
from quantlab.generation.generator import complete
from quantlab.generation.native_engine import NativeEngine
from quantlab.generation.prompt_cache import PromptCache
from quantlab.generation.sampling import SamplingParams

PARAMS = SamplingParams(temperature=1.0, top_p=1.0, min_p=0.0, seed=5)
CONTEXT = 128


@pytest.fixture(scope="module")
def tokenizer(llama_model: Path) -> Tokenizer:
    return load_tokenizer(llama_model)


@pytest.fixture(scope="module")
def engine(llama_model: Path) -> NativeEngine:
    return load_engine(llama_model, threads=1, context=CONTEXT)


@pytest.fixture
def chat(engine: NativeEngine, tokenizer: Tokenizer) -> Chat:
    engine.rewind(0)
    return Chat(engine, chat_layout(None, tokenizer), params=PARAMS, max_tokens=12)


def alone(chat: Chat, tokenizer: Tokenizer, token_ids: list[int], seed: int) -> tuple[str, tuple[int, ...]]:
    """The text and tokens that the same request gets where nothing is cached."""
    chat.engine.rewind(0)
    done = complete(
        chat.engine, tokenizer, token_ids, max_tokens=12, params=replace(PARAMS, seed=seed),
        stop=chat.conversation.layout.stop,
    )  # fmt: skip
    return done.text, done.token_ids


def test_answers_are_those_of_an_empty_cache(chat: Chat, tokenizer: Tokenizer) -> None:
    """The second one computes its message alone, and draws the same tokens as if all were computed anew."""
    pieces: list[str] = []
    first = chat.ask("Hi", pieces.append)
    assert first.timings is not None
    assert (first.timings.cached_tokens, first.seed, "".join(pieces)) == (0, 5, first.text)
    second = chat.ask("And then?")
    assert second.timings is not None
    known = first.timings.prompt_tokens + first.timings.generated_tokens
    assert second.timings.cached_tokens == known - 1  # the last token is computed with when another is asked for
    assert [message["content"].strip() for message in chat.conversation.messages] == [
        "Hi", first.text.strip(), "And then?", second.text.strip(),
    ]  # fmt: skip
    request = chat.conversation.question_again()
    assert alone(chat, tokenizer, request.token_ids, 5)[0] == second.text


def test_a_retry_takes_the_next_seed(chat: Chat, tokenizer: Tokenizer) -> None:
    first = chat.ask("Hi")
    texts = {first.text}
    for number in (1, 2):
        again = chat.retry()
        assert again.seed == 5 + number
        assert again.timings is not None
        assert again.timings.cached_tokens == again.timings.prompt_tokens - 1
        assert [m["content"] for m in chat.conversation.messages[1:]] in ([again.text], [again.text.strip()])
        texts.add(again.text)
    assert len(texts) == 3
    assert chat.ask("And then?").seed == 5
    assert chat.retry().seed == 6
    chat.undo()
    chat.undo()
    with pytest.raises(InputError, match="there is no message yet"):
        chat.retry()


def test_a_question_without_an_answer_is_answered_by_a_retry(chat: Chat) -> None:
    """As a loaded conversation may end; the seed is the first."""
    expected = chat.ask("Hi").text
    chat.load(None, [{"role": "user", "content": "Hi"}])
    answer = chat.retry()
    assert (answer.seed, answer.text) == (5, expected)
    assert [message["role"] for message in chat.conversation.messages] == ["user", "assistant"]


def test_an_undone_question_leaves_no_trace(chat: Chat) -> None:
    chat.ask("Hi")
    expected = chat.ask("And then?").text
    assert chat.undo() == "And then?"
    chat.ask("Another question")
    chat.undo()
    assert chat.ask("And then?").text == expected


def interrupting(after: int) -> Callable[[str], None]:
    """A reader that presses Ctrl-C at the piece of that number."""
    pieces: list[str] = []

    def read(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == after:
            raise KeyboardInterrupt

    return read


def test_an_interrupted_answer_is_kept_as_far_as_it_came(chat: Chat, tokenizer: Tokenizer) -> None:
    """And the chat goes on as if the model had said no more."""
    whole = chat.ask("Hi").text
    chat.undo()
    stopped = chat.ask("Hi", interrupting(4))
    assert (stopped.finish_reason, stopped.timings) == ("stopped", None)
    assert 0 < len(stopped.text) < len(whole)
    assert whole.startswith(stopped.text)
    assert chat.conversation.messages[1]["content"].strip() == stopped.text.strip()
    assert chat.stats().stopped == 1
    after = chat.ask("And then?")
    request = chat.conversation.question_again()
    assert alone(chat, tokenizer, request.token_ids, 5)[0] == after.text


def test_what_is_interrupted_before_the_first_word_was_not_asked(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a retry: the earlier answer stays."""
    chat.ask("Hi")
    before = list(chat.conversation.messages)

    def pressed(token_ids: list[int]) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(chat.engine, "append", pressed)
        assert chat.ask("And then?").text == ""
        assert chat.retry().text == ""
    assert chat.conversation.messages == before
    expected = chat.ask("And then?").text
    chat.load(None, before)
    assert chat.ask("And then?").text == expected


def test_room_for_an_answer_is_kept_free(chat: Chat) -> None:
    """As many tokens as asked for, but no more than a quarter of the context."""
    assert chat.conversation.limit == CONTEXT - 12
    chat.max_tokens = 1000
    assert chat.conversation.limit == CONTEXT - CONTEXT // 4
    with pytest.raises(InputError, match="max-tokens 0: at least one token must be asked for"):
        chat.max_tokens = 0
    assert chat.max_tokens == 1000


def test_a_long_conversation_never_outgrows_the_context(chat: Chat) -> None:
    dropped = 0
    for _ in range(12):
        answer = chat.ask("Where do the ships go?")
        assert answer.timings is not None
        assert answer.timings.prompt_tokens <= chat.conversation.limit
        dropped += answer.dropped
    stats = chat.stats()
    assert stats.left_out == dropped > 0
    assert len(chat.conversation.messages) == 24
    assert (stats.answers, stats.context, stats.seed) == (12, CONTEXT, 5)
    assert 0 < stats.context_used <= CONTEXT
    assert 0 < stats.cached_tokens < stats.prompt_tokens


def test_a_long_request_is_read_in_steps(llama_model: Path, tokenizer: Tokenizer) -> None:
    """Told of, interrupted between them, gone on with, and counted as one."""
    engine = load_engine(llama_model, threads=1, context=CONTEXT)
    chat = Chat(engine, chat_layout(None, tokenizer), params=PARAMS, max_tokens=12)
    whole = chat.ask("ship " * 25).text
    size = len(chat.conversation.question_again().token_ids)
    engine.rewind(0)
    steps: list[tuple[int, int]] = []
    chat.undo()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quantlab.generation.chat.READING_CHUNK", 20)

        def pressed(done: int, total: int) -> None:
            raise KeyboardInterrupt

        assert chat.ask("ship " * 25, None, pressed).text == ""
        assert engine.position == 20
        answer = chat.ask("ship " * 25, None, lambda done, total: steps.append((done, total)))
    left = size - 20
    assert steps == [(min(done, left), left) for done in range(20, left + 20, 20)]
    assert answer.timings is not None
    assert (answer.text, answer.timings.cached_tokens, answer.timings.prompt_tokens) == (whole, 20, size)
    assert answer.timings.prefill_tokens_per_second > 0


def test_counts_are_sums(chat: Chat) -> None:
    answers = [chat.ask("Hi"), chat.ask("And then?"), chat.retry()]
    timings = [answer.timings for answer in answers if answer.timings is not None]
    stats = chat.stats()
    assert stats.answers == len(timings) == 3
    assert stats.prompt_tokens == sum(one.prompt_tokens for one in timings)
    assert stats.cached_tokens == sum(one.cached_tokens for one in timings)
    assert stats.generated_tokens == sum(one.generated_tokens for one in timings)
    assert stats.seed == 6


def test_ctrl_c_behind_an_answer_keeps_it(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it goes to the prompt cache: nothing of it is lost but that."""

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(chat.engine, "keep", interrupted)
    answer = chat.ask("Hi")
    assert answer.finish_reason != "stopped"
    assert chat.last is answer
    assert [message["role"] for message in chat.conversation.messages] == ["user", "assistant"]


def test_parameters_of_another_model_are_refused_at_once(chat: Chat) -> None:
    before = chat.params
    with pytest.raises(InputError, match="token id 512 is outside"):
        chat.params = replace(PARAMS, logit_bias={512: 1.0})
    assert chat.params is before


def test_a_request_is_kept_once(llama_model: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """However many parts it was read in: behind it, and behind its answer."""
    kept: list[int] = []

    class Counted(PromptCache):
        def save(self, engine: NativeEngine) -> None:
            kept.append(engine.position)
            super().save(engine)

    engine = load_engine(llama_model, threads=1, context=CONTEXT)
    engine.prompt_cache = Counted(tmp_path)
    chat = Chat(engine, chat_layout(None, tokenizer), params=PARAMS, max_tokens=12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quantlab.generation.chat.READING_CHUNK", 20)
        answer = chat.ask("ship " * 25)
    assert answer.timings is not None
    assert kept == [answer.timings.prompt_tokens, engine.position]


def test_another_process_goes_on_where_this_one_stopped(
    llama_model: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """With a prompt cache answers are kept too, and a conversation that is loaded is not read again."""

    def begun() -> Chat:
        engine = load_engine(llama_model, threads=1, context=CONTEXT)
        engine.prompt_cache = PromptCache(tmp_path)
        return Chat(engine, chat_layout(None, tokenizer), params=PARAMS, max_tokens=12)

    first = begun()
    first.ask("The lamp in the boathouse was lit, and nobody knew by whom")
    known = first.engine.position
    assert known > 32
    expected = first.ask("And then?").text
    second = begun()
    second.load(None, first.conversation.messages[:2])
    answer = second.ask("And then?")
    assert answer.text == expected
    assert answer.timings is not None
    assert answer.timings.cached_tokens >= known - 7  # a block has eight tokens at least
