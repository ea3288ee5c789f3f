"""What a look at samples shows: which of their text carries loss, whether the end token does, and totals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from quantlab.checkpoint.tokenizer import Tokenizer
from quantlab.training.sample import NO_LOSS, Sample


@dataclass(frozen=True)
class Segment:
    """Text of successive tokens that all carry loss, or all do not; special tokens are written out."""

    text: str
    tokens: int
    trained: bool


@dataclass(frozen=True)
class SampleView:
    """A sample to show. `ends` says whether the last token that carries loss ends a text; `as_served` is `Sample`'s."""

    place: str
    segments: tuple[Segment, ...]
    tokens: int
    trained_tokens: int
    ends: bool
    as_served: bool | None


@dataclass(frozen=True)
class BatchTotals:
    """Counts over samples."""

    samples: int
    tokens: int
    trained_tokens: int
    longest: int


def describe_batch(samples: Sequence[Sample], tokenizer: Tokenizer) -> list[SampleView]:
    """The text of each sample in segments, which together are the text of all its ids.

    A character whose bytes lie on both sides of a border shows on the later one.
    """
    return [_view(sample, tokenizer) for sample in samples]


def batch_totals(samples: Sequence[Sample]) -> BatchTotals:
    """How much there is to train on."""
    lengths = [len(sample.input_ids) for sample in samples]
    trained = sum(len(sample.trained) for sample in samples)
    return BatchTotals(len(samples), sum(lengths), trained, max(lengths, default=0))


def _view(sample: Sample, tokenizer: Tokenizer) -> SampleView:
    trained = sample.trained
    ends = bool(trained) and trained[-1] in tokenizer.eos
    segments = tuple(_segments(sample, tokenizer))
    return SampleView(sample.place, segments, len(sample.input_ids), len(trained), ends, sample.as_served)


def _segments(sample: Sample, tokenizer: Tokenizer) -> list[Segment]:
    segments, shown, end = [], 0, 0
    for carries_loss, run in groupby(label != NO_LOSS for label in sample.labels):
        count = len(list(run))
        end += count
        text = tokenizer.decode(sample.input_ids[:end], skip_special_tokens=False)
        if end < len(sample.labels):
            text = text.rstrip("\ufffd")  # half a character
        segments.append(Segment(text[shown:], count, carries_loss))
        shown = len(text)
    return segments
