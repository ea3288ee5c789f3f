"""Conversations: exact ids and labels for templates of several shapes."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import BRACKETS, CHATML, HEADERS, OPENS_THOUGHT, PLAIN, THOUGHTS, TURNS, byte_level

from quantlab import InputError, load_tokenizer
from quantlab.checkpoint.chat_text import chat_ids, render_chat
from quantlab.checkpoint.tokenizer import Tokenizer
from quantlab.training.chat_labels import ChatEncoder
from quantlab.training.row_forms import Conversation
from quantlab.training.sample import NO_LOSS, Sample
from quantlab.training.text_labels import TextEncoder

FABLE = Path(__file__).parents[2] / "models" / "fable-9m"
PROSE = Path(__file__).parents[1] / "data" / "prose.txt"


@lru_cache
def tokenizer(eos: str = "<|im_end|>", bos: str | None = None) -> Tokenizer:
    return byte_level(PROSE, eos=eos, bos=bos)


@lru_cache
def fable() -> Tokenizer:
    return load_tokenizer(FABLE)


def said(*texts: str, system: str | None = None) -> Conversation:
    """A conversation of user and assistant by turns."""
    first = [] if system is None else [{"role": "system", "content": system}]
    turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    return Conversation((*first, *turns))


def samples_of(template: str, row: Conversation, words: Tokenizer, **options: bool) -> list[Sample]:
    return ChatEncoder(template, TextEncoder(words), **options).samples(row, "d.jsonl:1")


def put_together(words: Tokenizer, *parts: str | tuple[str]) -> tuple[list[int], list[int]]:
    """Ids and labels of parts that are encoded apart; those in a tuple carry loss."""
    ids: list[int] = []
    labels: list[int] = []
    for part in parts:
        text = part if isinstance(part, str) else part[0]
        found = words.encode(text, add_special_tokens=False)
        ids += found
        labels += [NO_LOSS] * len(found) if isinstance(part, str) else found
    return ids, labels


def test_chatml() -> None:
    """All answers are learned, each with the token that ends it, and not the line break behind that."""
    (sample,) = samples_of(CHATML, said("Hi", "Hello there.", "Bye", "So long.", system="Be kind."), tokenizer())
    start = "<|im_start|>assistant\n"
    ids, labels = put_together(
        tokenizer(),
        f"<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n{start}", ("Hello there.<|im_end|>",),
        f"\n<|im_start|>user\nBye<|im_end|>\n{start}", ("So long.<|im_end|>",), "\n",
    )  # fmt: skip
    assert (sample.input_ids, sample.labels, sample.as_served) == (ids, labels, True)


def test_only_the_last_answer_if_asked() -> None:
    (sample,) = samples_of(CHATML, said("Hi", "Hello there.", "Bye", "So long."), tokenizer(), last_turn_only=True)
    assert sample.trained == tokenizer().encode("So long.<|im_end|>")


def test_answers_of_the_prompt_are_not_learned() -> None:
    """As in rows whose prompt and completion are messages."""
    row = Conversation(said("Hi", "Hello there.", "Bye", "So long.").messages, learned_from=3)
    (sample,) = samples_of(CHATML, row, tokenizer())
    assert sample.trained == tokenizer().encode("So long.<|im_end|>")


def test_what_follows_the_last_answer_carries_no_loss() -> None:
    (sample,) = samples_of(CHATML, said("Hi", "Hello there.", "Bye"), tokenizer())
    assert sample.trained == tokenizer().encode("Hello there.<|im_end|>")
    assert tokenizer().decode(sample.input_ids, skip_special_tokens=False).endswith("user\nBye<|im_end|>\n")


def test_llamas_brackets_on_sentencepiece() -> None:
    """A start token for every turn, the system's text in the first; the space before an answer is learned."""
    (sample,) = samples_of(BRACKETS, said("Hi", "Hello.", "Bye", "So long.", system="Be kind."), fable())
    first = "[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi [/INST]"
    one, two = (fable().encode(text) for text in (f"{first} Hello. ", "[INST] Bye [/INST] So long. "))
    asked_one, asked_two = (len(fable().encode(text)) for text in (first, "[INST] Bye [/INST]"))
    assert sample.input_ids == [*one, 2, *two, 2]
    spans = [NO_LOSS] * asked_one + [*one[asked_one:], 2] + [NO_LOSS] * asked_two + [*two[asked_two:], 2]
    assert sample.labels == spans
    assert sample.input_ids.count(1) == 2


def test_headers_with_a_start_token_that_the_template_writes() -> None:
    words = tokenizer(bos="<start>")
    (sample,) = samples_of(HEADERS, said("Hi ", " Hello there. "), words)
    ids, labels = put_together(
        words,
        "<start><|im_start|>user<turn>\n\nHi<|im_end|><|im_start|>assistant<turn>\n\n", ("Hello there.<|im_end|>",),
    )  # fmt: skip
    assert (sample.input_ids, sample.labels) == (ids, labels)


def test_a_start_token_that_the_template_does_not_write() -> None:
    words = tokenizer(bos="<start>")
    (sample,) = samples_of(CHATML, said("Hi", "Hello."), words)
    assert words.decode(sample.input_ids[:2], skip_special_tokens=False) == "<start><|im_start|>"
    assert sample.input_ids.count(words.bos) == 1


def test_turns_without_a_system_role() -> None:
    words = tokenizer("</turn>", "<start>")
    (sample,) = samples_of(TURNS, said("Hi", "Hello there."), words)
    ids, labels = put_together(
        words, "<start><turn>user\nHi</turn>\n<turn>model\n", ("Hello there.</turn>",), "\n"
    )  # fmt: skip
    assert (sample.input_ids, sample.labels) == (ids, labels)
    with pytest.raises(InputError, match=r"d.jsonl:1: the model's chat template fails on these messages: no system"):
        samples_of(TURNS, said("Hi", "Hello there.", system="Be kind."), words)


def test_dropped_thoughts_make_a_sample_of_every_turn() -> None:
    """Each learns its own thought, behind a prompt as serving has it: without the earlier ones."""
    row = said("1+1?", "<think>hm</think>2", "2+2?", "<think>oh</think>4")
    one, two = samples_of(THOUGHTS, row, tokenizer())
    start = "<|im_start|>assistant\n"
    asked = f"<|im_start|>user\n1+1?<|im_end|>\n{start}"
    assert (one.input_ids, one.labels) == put_together(tokenizer(), asked, ("<think>hm</think>2<|im_end|>",), "\n")
    asked += f"2<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n{start}"
    assert (two.input_ids, two.labels) == put_together(tokenizer(), asked, ("<think>oh</think>4<|im_end|>",), "\n")
    assert (one.place, two.place, one.as_served, two.as_served) == ("d.jsonl:1", "d.jsonl:1", True, True)
    (last,) = samples_of(THOUGHTS, row, tokenizer(), last_turn_only=True)
    assert last == two


def test_a_boundary_that_merges_keeps_the_prompts_ids() -> None:
    """`Assistant: ` and `Hello` would be cut before the space if they were one text."""
    words = tokenizer("<|endoftext|>")
    encoder = ChatEncoder(PLAIN, TextEncoder(words))
    asked = words.encode("User: Hi\nAssistant: ")
    assert words.encode("User: Hi\nAssistant: the end.\n")[: len(asked)] != asked
    (sample,) = encoder.samples(said("Hi", "the end."), "here")
    answer = words.encode("the end.\n")
    assert sample.input_ids == [*asked, *answer, 0]
    assert sample.labels == [NO_LOSS] * len(asked) + [*answer, 0]
    assert encoder.notes() == [
        "the chat template ends 1 sample with no special token; the end token <|endoftext|> is added"
    ]


def test_every_turn_has_an_end() -> None:
    """Where the template writes none, an end token follows; but not in what a later request sends."""
    words = tokenizer("<|endoftext|>")
    template = PLAIN.replace("'Assistant: '", "'Assistant:'")  # no boundary merges
    one, two = samples_of(template, said("Hi", "the end.", "Bye", "ever."), words)
    asked = "User: Hi\nAssistant:"
    assert (one.input_ids, one.labels) == put_together(words, asked, (" the end.\n<|endoftext|>",))
    asked += " the end.\nUser: Bye\nAssistant:"
    assert (two.input_ids, two.labels) == put_together(words, asked, (" ever.\n<|endoftext|>",))
    (followed,) = samples_of(template, said("Hi", "the end.", "Bye"), words)
    assert followed == one


def test_a_template_that_leaves_the_answer_out() -> None:
    """As those for lists of parts do with a text."""
    template = CHATML.replace("m.content", "(m.content if m.role == 'user' else '')")
    with pytest.raises(InputError, match="leaves out what the assistant says"):
        samples_of(template, said("Hi", "Hello."), tokenizer())


def test_an_end_of_turn_that_generation_does_not_stop_at_is_told() -> None:
    encoder = ChatEncoder(CHATML, TextEncoder(tokenizer("<|endoftext|>")))
    (sample,) = encoder.samples(said("Hi", "Hello."), "here")
    assert sample.trained == tokenizer().encode("Hello.<|im_end|>")
    assert encoder.notes() == [
        "<|im_end|> ends 1 sample, and this model's generation does not stop at it: add it to eos_token_id in "
        "generation_config.json"
    ]


def test_generation_marks_where_answers_do_not_continue_the_prompt() -> None:
    encoder = ChatEncoder(OPENS_THOUGHT, TextEncoder(tokenizer()))
    (sample,) = encoder.samples(said("Hi", "Hello.", "Bye", "So long."), "here")
    ids, labels = put_together(
        tokenizer(),
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", ("Hello.<|im_end|>",),
        "\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n", ("So long.<|im_end|>",), "\n",
    )  # fmt: skip
    assert (sample.input_ids, sample.labels, sample.as_served) == (ids, labels, False)
    assert "labelled by the template's generation marks" in encoder.notes()[0]


def test_marks_of_the_learned_turns_only() -> None:
    (sample,) = samples_of(OPENS_THOUGHT, said("Hi", "Hello.", "Bye", "So long."), tokenizer(), last_turn_only=True)
    assert sample.trained == tokenizer().encode("So long.<|im_end|>")


def test_without_marks_such_a_template_is_refused() -> None:
    unmarked = OPENS_THOUGHT.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    with pytest.raises(InputError, match=r"asks for an answer with '<think>' where it writes 'Hello\.<\|im_end\|>"):
        samples_of(unmarked, said("Hi", "Hello."), tokenizer())


WORDS = st.text(st.sampled_from("aeT .,\n19\u00e9\u4e2d\U0001f600'"), min_size=1, max_size=10).filter(str.strip)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([CHATML, BRACKETS, HEADERS, THOUGHTS, PLAIN]), st.lists(WORDS, min_size=2, max_size=5))
def test_every_prompt_is_what_serving_sends(template: str, texts: list[str]) -> None:
    """Whatever the template: before each learned span stand the ids of a request with the messages until there, and
    the spans are the answers.
    """
    words = tokenizer(bos="<start>")
    row = said(*texts)
    answers = [n for n, m in enumerate(row.messages) if m["role"] == "assistant"]
    spans = []
    for sample in samples_of(template, row, words):
        assert all(label in (NO_LOSS, i) for label, i in zip(sample.labels, sample.input_ids, strict=True))
        known = [label != NO_LOSS for label in sample.labels]
        starts = [n for n in range(1, len(known)) if known[n] and not known[n - 1]]
        ends = [n + 1 for n in range(len(known)) if known[n] and not [*known, False][n + 1]]
        spans += [
            (sample.input_ids[:start], sample.input_ids[start:end]) for start, end in zip(starts, ends, strict=True)
        ]
    assert len(spans) == len(answers)
    for number, (before, learned) in zip(answers, spans, strict=True):
        asked = render_chat(template, row.messages[:number], words, "here", generation_prompt=True)
        assert before == chat_ids(asked, words)
        assert words.decode(learned).strip() == row.messages[number]["content"].strip()
