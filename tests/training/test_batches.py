"""Packing keeps samples whole and apart; padding changes nothing."""

import pytest
import torch
from tiny_families import tiny

from quantlab.training.batches import Collator, Window, packed, unpacked
from quantlab.training.next_token_loss import computes_loss
from quantlab.training.sample import NO_LOSS, Sample

pytest.importorskip("trl")


def sample(length: int, start: int) -> Sample:
    ids = [(start + 7 * i) % 90 + 3 for i in range(length)]
    return Sample(ids, [NO_LOSS, NO_LOSS, *ids[2:]], f"data:{start}")


SAMPLES = [sample(length, 11 * number) for number, length in enumerate((5, 9, 14, 3, 7, 16, 4))]


def test_every_sample_is_in_one_window_whole() -> None:
    windows = packed(SAMPLES, 16).windows
    assert all(len(window.input_ids) <= 16 for window in windows)
    found = []
    for window in windows:
        start = 0
        for length in window.lengths:
            found.append((window.input_ids[start : start + length], window.labels[start : start + length]))
            start += length
        assert start == len(window.input_ids)
    assert sorted(found) == sorted((s.input_ids, s.labels) for s in SAMPLES)
    assert len(windows) == 4  # 58 tokens in windows of 16: best-fit decreasing wastes none


def test_a_batch_is_padded_on_the_right_and_starts_positions_anew() -> None:
    windows = [Window([5, 6, 7, 8, 9], [NO_LOSS, 6, 7, NO_LOSS, 9], [2, 3]), Window([4, 3, 2], [4, 3, 2], [3])]
    batch = Collator(pad=0)(windows)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [4, 3, 2, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2], [0, 1, 2, 3, 4]]
    # the first token of each sample has nothing before it to be predicted from
    assert batch["labels"].tolist() == [[-100, 6, -100, -100, 9], [-100, 3, 2, -100, -100]]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "qwen3", "gemma2", "phi3"])
def test_the_loss_of_a_packed_batch_is_the_sum_of_its_samples(family: str) -> None:
    model = tiny(family, tied=True)
    computes_loss(model)
    collator = Collator(pad=0)
    with torch.no_grad():
        alone = [model(**collator([window])).item() for window in unpacked(SAMPLES).windows]
        padded = model(**collator(unpacked(SAMPLES).windows)).item()
        together = model(**collator(packed(SAMPLES, 16).windows)).item()
    assert padded == pytest.approx(sum(alone), rel=1e-5)
    assert together == pytest.approx(sum(alone), rel=1e-5)
