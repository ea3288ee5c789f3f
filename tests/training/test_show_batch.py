"""What --show-batch tells of samples."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_tokenizers import CHATML, byte_level

from quantlab import load_tokenizer
from quantlab.training.chat_labels import ChatEncoder
from quantlab.training.row_forms import Completion, Conversation
from quantlab.training.sample import Sample, sample_of
from quantlab.training.show_batch import BatchTotals, SampleView, Segment, batch_totals, describe_batch
from quantlab.training.text_labels import TextEncoder, completion_sample

FABLE = Path(__file__).parents[2] / "models" / "fable-9m"


@pytest.fixture(scope="module")
def bytes_(prose: Path) -> TextEncoder:
    return TextEncoder(byte_level(prose))


def test_a_conversation_in_segments(bytes_) -> None:
    row = Conversation(({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes\u00e9"}))
    (sample,) = ChatEncoder(CHATML, bytes_).samples(row, "d.jsonl:1")
    (view,) = describe_batch([sample], bytes_.tokenizer)
    asked = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    counts = [len(bytes_.tokenizer.encode(text)) for text in (asked, "Yes\u00e9<|im_end|>")]
    segments = (
        Segment(asked, counts[0], trained=False), Segment("Yes\u00e9<|im_end|>", counts[1], trained=True),
        Segment("\n", 1, trained=False),
    )  # fmt: skip
    assert view == SampleView("d.jsonl:1", segments, sum(counts) + 1, counts[1], ends=True, as_served=True)


def test_sentencepiece_keeps_its_spaces() -> None:
    fable = TextEncoder(load_tokenizer(FABLE))
    sample = completion_sample(Completion("The sea", " is old."), fable, "here")
    (view,) = describe_batch([sample], fable.tokenizer)
    assert [(part.text, part.trained) for part in view.segments] == [("<s> The sea", False), (" is old.</s>", True)]


def test_a_sample_without_its_end_or_without_loss(bytes_) -> None:
    ids = bytes_.tokenizer.encode("some words")
    views = describe_batch(
        [sample_of(ids, [(1, len(ids))], "a", None), sample_of(ids, [], "b", None)], bytes_.tokenizer
    )
    assert [(view.trained_tokens, view.ends, view.as_served) for view in views] == [
        (len(ids) - 1, False, None), (0, False, None)
    ]  # fmt: skip


def test_a_character_on_a_border_shows_whole(bytes_) -> None:
    ids = bytes_.tokenizer.encode("a\U0001f600b")
    (view,) = describe_batch([sample_of(ids, [(2, len(ids))], "a", None)], bytes_.tokenizer)
    assert [part.text for part in view.segments] == ["a", "\U0001f600b"]


def test_totals(bytes_) -> None:
    samples = [sample_of([1, 2, 3], [(1, 3)], "a", None), sample_of([1, 2, 3, 4], [(3, 4)], "b", None)]
    assert batch_totals(samples) == BatchTotals(samples=2, tokens=7, trained_tokens=3, longest=4)
    assert batch_totals([]) == BatchTotals(0, 0, 0, 0)
    assert isinstance(samples[0], Sample)
