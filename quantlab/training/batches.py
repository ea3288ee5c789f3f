"""Samples as the Trainer takes them: a list that packs if asked to, and batches of one length.

Packing is TRL's best-fit decreasing: whole samples are put into windows, none is cut. In a packed window each sample's
positions begin at 0, from which transformers makes the mask that keeps samples from seeing each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from quantlab.errors import missing_extra
from quantlab.training.sample import NO_LOSS, Sample


@dataclass(frozen=True)
class Window:
    """One row of a batch: samples laid end to end."""

    input_ids: list[int]
    labels: list[int]
    lengths: list[int]


class SampleSet(torch.utils.data.Dataset[Window]):
    """Windows by index; `tokens` counts those of all of them."""

    def __init__(self, windows: Sequence[Window]) -> None:
        self.windows = list(windows)
        self.tokens = sum(len(window.input_ids) for window in self.windows)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> Window:
        return self.windows[index]


def unpacked(samples: Sequence[Sample]) -> SampleSet:
    """Every sample a window of its own."""
    return SampleSet([Window(s.input_ids, s.labels, [len(s.input_ids)]) for s in samples])


def packed(samples: Sequence[Sample], context: int) -> SampleSet:
    """Samples put together into windows of at most `context` tokens.

    Raises:
        InputError: trl is not installed.
    """
    try:
        from datasets import Dataset, disable_progress_bars
        from trl.data_utils import pack_dataset
    except ImportError:
        raise missing_extra("trl", "train") from None

    longest = max(len(sample.input_ids) for sample in samples)
    assert longest <= context, f"a sample of {longest} tokens would be cut"
    disable_progress_bars()
    rows = Dataset.from_dict({"input_ids": [s.input_ids for s in samples], "labels": [s.labels for s in samples]})
    result = pack_dataset(rows, context, "bfd", {"batch_size": len(samples), "keep_in_memory": True})
    return SampleSet([Window(row["input_ids"], row["labels"], row["seq_lengths"]) for row in result])


@dataclass(frozen=True)
class Collator:
    """Windows to one batch, padded on the right with `pad`.

    Positions start anew with every sample, and no attention mask goes along: the mask that transformers makes of
    positions is causal within each sample. Padding goes on from the last sample, which cannot see it.
    """

    pad: int

    def __call__(self, windows: list[Window]) -> dict[str, Any]:
        """int64 tensors [windows, longest]: input_ids, labels, position_ids."""
        longest = max(len(window.input_ids) for window in windows)
        shape = (len(windows), longest)
        ids = torch.full(shape, self.pad)
        labels = torch.full(shape, NO_LOSS)
        positions = torch.zeros(shape, dtype=torch.int64)
        for row, window in enumerate(windows):
            count = len(window.input_ids)
            ids[row, :count] = torch.tensor(window.input_ids)
            labels[row, :count] = torch.tensor(window.labels)
            start = 0
            for length in [*window.lengths[:-1], window.lengths[-1] + longest - count]:
                positions[row, start : start + length] = torch.arange(length)
                labels[row, start] = NO_LOSS  # there is nothing to predict it from
                start += length
        return {"input_ids": ids, "labels": labels, "position_ids": positions}
