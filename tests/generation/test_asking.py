"""A question through all its steps on a tiny model: what each step is given, what is reused, and what is counted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from quantlab.checkpoint import load_tokenizer
from quantlab.errors import InputError
from quantlab.generation.asking import Manner, ask
from quantlab.generation.engines import load_engine
from quantlab.generation.examples import Example
from quantlab.generation.generator import complete
from quantlab.generation.prompt_format import PromptFormat, prompt_format
from quantlab.generation.samples import complete_many
from quantlab.generation.sampling import SamplingParams
from quantlab.generation.sources import GivenSource
from quantlab.generation.templates import TEMPLATES, Asked, find_template
from quantlab.generation.votes import majority
from quantlab.generation.writer import GREEDY, Writer

QUESTION = Asked("Who has the lamp?", "text")
SHORT = Manner(reasoning_tokens=12, answer_tokens=6)
CHAT = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def model(make_model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), "llama", max_position_embeddings=256)


@pytest.fixture
def writer(model: Path) -> Writer:
    """A new engine, so that a test knows what its cache holds."""
    return Writer(load_engine(model, threads=1), prompt_format(model, load_tokenizer(model)))


def greedy(writer: Writer, text: str, tokens: int) -> str:
    return complete(writer.engine, writer.format.tokenizer, text, max_tokens=tokens, params=GREEDY).text


def test_zero_shot_cot_goes_on_with_its_own_text(writer: Writer) -> None:
    """Prompt, reasoning, a space, the extraction trigger (the paper's z2), of which only the trigger is computed."""
    heard: list[str] = []
    found = ask(writer, TEMPLATES["zero-shot-cot"], QUESTION, SHORT, heard.append)
    (sample,) = found.samples
    first, second = sample.steps
    assert first.prompt == "Q: Who has the lamp?\nA: Let's think step by step."
    thought = first.completion.text
    assert second.prompt == f"{first.prompt}{thought} \nTherefore, the answer is"
    assert (len(first.completion.token_ids), len(second.completion.token_ids)) == (12, 6)
    assert second.completion.timings.cached_tokens >= first.completion.timings.prompt_tokens
    assert sample.reasoning == f"Let's think step by step.{thought}".strip() == found.reasoning
    assert "".join(heard) == f"Let's think step by step.{thought} \nTherefore, the answer is{second.completion.text}"
    assert (found.votes, found.sources) == (None, ())
    twin = greedy(writer, first.prompt, 12)
    assert thought == twin
    assert second.completion.text == greedy(writer, f"{first.prompt}{twin} \nTherefore, the answer is", 6)


def test_tokens_are_counted_once(writer: Writer) -> None:
    """What the model did not write: the first prompt, and what the second adds to the reasoning."""
    found = ask(writer, TEMPLATES["zero-shot-cot"], QUESTION, SHORT)
    first, second = found.samples[0].steps
    added = writer.tokens(second.prompt) - writer.tokens(first.prompt + first.completion.text)
    assert 0 < added < 25
    assert found.prompt_tokens == writer.tokens(first.prompt) + added
    assert found.generated_tokens == 18
    direct = ask(writer, TEMPLATES["zero-shot"], QUESTION, SHORT)
    assert direct.prompt_tokens == writer.tokens("Q: Who has the lamp?\nA: The answer is")
    assert direct.generated_tokens == 6  # an answer of a known type is short
    assert ask(writer, TEMPLATES["zero-shot"], replace(QUESTION, answer_type="free"), SHORT).generated_tokens == 12


def test_samples_vote(writer: Writer) -> None:
    """Each is the completion of its own seed, answered greedily; the majority's first sample is shown."""
    numbers = replace(QUESTION, answer_type="yes-no")
    manner = replace(SHORT, samples=4, seed=3)
    heard: list[str] = []
    found = ask(writer, TEMPLATES["self-consistency"], numbers, manner, heard.append)
    params = SamplingParams(temperature=0.7, top_k=40, top_p=1.0, min_p=0.0, seed=3)
    prompt = "Q: Who has the lamp?\nA: Let's think step by step."
    twins = complete_many(
        writer.engine, writer.format.tokenizer, writer.format.ids(prompt), 4, max_tokens=12, params=params
    )
    assert [sample.steps[0].completion.token_ids for sample in found.samples] == [twin.token_ids for twin in twins]
    assert len({twin.token_ids for twin in twins}) > 1
    for sample in found.samples:
        asked = f"{prompt}{sample.steps[0].completion.text} \nTherefore, the answer (Yes or No) is"
        assert sample.steps[1].prompt == asked
        assert sample.steps[1].completion.text == greedy(writer, asked, 6)
    assert (found.answer, found.votes) == majority([sample.answer for sample in found.samples])
    assert heard == []
    assert found.reasoning == found.samples[found.chosen].reasoning
    assert found.generated_tokens == sum(len(s.completion.token_ids) for a in found.samples for s in a.steps)


def test_free_answers_vote_as_short_texts(writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole texts would hardly agree."""
    types: list[str] = []
    monkeypatch.setattr("quantlab.generation.asking.extracted_answer", lambda _, kind, *__: types.append(kind) or "a")
    asked = replace(QUESTION, answer_type="free")
    ask(writer, TEMPLATES["self-consistency"], asked, replace(SHORT, samples=2))
    ask(writer, TEMPLATES["cot"], asked, SHORT)
    assert types == ["text", "text", "free"]


def test_the_majoritys_sample_is_chosen(writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter(["", "b", "a", "a"])
    monkeypatch.setattr("quantlab.generation.asking.extracted_answer", lambda *_: next(answers))
    found = ask(writer, TEMPLATES["self-consistency"], QUESTION, replace(SHORT, samples=4))
    assert (found.answer, found.votes, found.chosen) == ("a", {"a": 2, "b": 1}, 2)


def test_a_filler_is_as_long_as_the_reasoning(writer: Writer) -> None:
    found = ask(writer, TEMPLATES["filler"], QUESTION, SHORT)
    first, second = found.samples[0].steps
    start, end = "Q: Who has the lamp?\nA: Let's think step by step.", " \nTherefore, the answer is"
    filler = second.prompt.removeprefix(start).removesuffix(end)
    assert set(filler) == {" ", "."}
    length, wanted = (
        len(writer.format.tokenizer.encode(text, add_special_tokens=False)) for text in (filler, first.completion.text)
    )
    assert abs(length - wanted) <= 4
    assert found.generated_tokens == 6  # the reasoning counts for nothing
    assert found.prompt_tokens == writer.tokens(second.prompt)


def test_plain_few_shot_ends_at_the_next_question(writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its reasoning is what precedes the phrase of the examples."""
    stops = []
    write = Writer.write

    def spied(self: Writer, *arguments: object, **options: object):
        stops.append(options["stop"])
        return write(self, *arguments, **options)

    monkeypatch.setattr(Writer, "write", spied)
    asked = replace(QUESTION, examples=(Example("Who?", "Nell", "She came."),))
    ask(writer, TEMPLATES["few-shot-cot"], asked, replace(SHORT, stop=("###",)))
    ask(writer, TEMPLATES["zero-shot"], asked, SHORT)
    assert stops == [("###", "\nQ:"), ()]
    one = complete(writer.engine, writer.format.tokenizer, "a", max_tokens=1)
    said = replace(one, text=" It is dark. The answer is Nell.")
    monkeypatch.setattr(Writer, "write", lambda *_, **__: [said])
    found = ask(writer, TEMPLATES["few-shot-cot"], asked, SHORT)
    assert (found.reasoning, found.answer) == ("It is dark.", "nell")


def test_a_chat_template_underneath(writer: Writer, tokenizer_folder: Path) -> None:
    """The answer's beginning follows the template's; a role that it refuses goes to the user's message."""
    chat = Writer(writer.engine, PromptFormat(load_tokenizer(tokenizer_folder), CHAT, "model"))
    asked = replace(QUESTION, role="You are a clerk.")
    found = ask(chat, find_template("role+cot"), asked, SHORT)
    text = "<user>You are a clerk.\n\nWho has the lamp?\n<assistant>Let's think step by step."
    assert found.samples[0].steps[0].prompt == text
    assert found.samples[0].steps[1].prompt.startswith(text)
    with pytest.raises(InputError, match="model: the model's chat template fails on these messages: never"):
        ask(Writer(writer.engine, PromptFormat(chat.format.tokenizer, "{{ raise_exception('never') }}", "model")),
            TEMPLATES["role"], asked, SHORT)  # fmt: skip


def test_passages_fit_their_budget(writer: Writer) -> None:
    """By default half of the context; the sources of those that are shown are told."""
    passages = [GivenSource(name, "The old man has the lamp and the key. " * 3) for name in ("a.md", "b.md", "c.md")]
    asked = replace(QUESTION, passages=passages)
    cost = len(writer.format.tokenizer.encode(passages[0].text.strip(), add_special_tokens=False))
    found = ask(writer, TEMPLATES["rag"], asked, replace(SHORT, passage_tokens=cost))
    assert found.sources == ("a.md",)
    assert (
        found.samples[0]
        .steps[0]
        .prompt.endswith(f"[1] {passages[0].text.strip()}\n\nQ: Who has the lamp?\nA: The answer is")
    )
    with pytest.raises(InputError, match="3 tokens for passages hold not even the beginning of the first"):
        ask(writer, TEMPLATES["rag"], asked, replace(SHORT, passage_tokens=3))
    assert ask(writer, TEMPLATES["zero-shot"], asked, SHORT).sources == ()


def test_reasoning_leaves_room_for_the_answer(writer: Writer) -> None:
    """In the tiny model's 256 tokens, also where its words take more tokens than it wrote; a question that leaves none
    is refused.
    """
    asked = Asked("lamp " * 60, "text")
    found = ask(writer, TEMPLATES["cot"], asked, Manner(reasoning_tokens=500, answer_tokens=6))
    first, second = found.samples[0].steps
    assert 1 <= len(first.completion.token_ids) < 100
    assert len(second.completion.token_ids) == 6
    with pytest.raises(InputError, match=r"takes \d+ tokens with its template and room for an answer, which leaves"):
        ask(writer, TEMPLATES["cot"], Asked("lamp " * 250, "text"), SHORT)
    with pytest.raises(InputError, match="3 samples at temperature 0 are all the same; ask for a temperature above 0"):
        ask(writer, TEMPLATES["zero-shot"], QUESTION, replace(SHORT, samples=3))


def test_what_was_written_is_remembered_until_forgotten(writer: Writer) -> None:
    """Two templates with the same prompt cost one run; the next run has the same result."""
    first = ask(writer, TEMPLATES["zero-shot"], QUESTION, SHORT).samples[0].steps[0].completion
    again = ask(writer, find_template("closed-book"), QUESTION, SHORT).samples[0].steps[0].completion
    assert again is first
    writer.forget()
    anew = ask(writer, TEMPLATES["zero-shot"], QUESTION, SHORT).samples[0].steps[0].completion
    assert anew is not first
    assert (anew.text, anew.token_ids) == (first.text, first.token_ids)
