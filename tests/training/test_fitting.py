"""Samples longer than the context, and rows held out."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantlab import InputError
from quantlab.training.fitting import fitted, held_out
from quantlab.training.sample import NO_LOSS, Sample, sample_of

SHORT = sample_of([1, 2, 3, 9], [(2, 4)], "d.jsonl:1", True)
LONG = sample_of([1, 2, 3, 4, 5, 6, 9], [(3, 7)], "d.jsonl:2", True)
ALL_PROMPT = sample_of([1, 2, 3, 4, 5, 9], [(5, 6)], "d.jsonl:3", True)


def test_samples_that_fit_stay_as_they_are() -> None:
    notes: list[str] = []
    assert fitted([SHORT, LONG], 7, "error", notes) == [SHORT, LONG]
    assert notes == []


def test_an_error_lists_what_is_too_long() -> None:
    with pytest.raises(
        InputError, match=r"2 samples longer than the context of 5 tokens: d.jsonl:2 \(7\), d.jsonl:3 \(6\)"
    ):
        fitted([SHORT, LONG, ALL_PROMPT], 5, "error", [])
    many = [Sample([0] * 9, [0] * 9, f"d.jsonl:{n}") for n in range(1, 14)]
    with pytest.raises(InputError, match=r"13 samples.*d.jsonl:10 \(9\), and 3 more; give a longer"):
        fitted(many, 5, "error", [])


def test_skipped_samples_are_counted() -> None:
    notes: list[str] = []
    assert fitted([SHORT, LONG], 5, "skip", notes) == [SHORT]
    assert notes == ["1 sample longer than 5 tokens left out: d.jsonl:2 (7)"]


def test_cut_samples_lose_their_end_and_it_is_told() -> None:
    notes: list[str] = []
    short, cut = fitted([SHORT, LONG, ALL_PROMPT], 5, "cut", notes)
    assert short == SHORT
    assert cut == Sample([1, 2, 3, 4, 5], [NO_LOSS, NO_LOSS, NO_LOSS, 4, 5], "d.jsonl:2", True)
    assert notes == [
        "2 samples cut to 5 tokens, 3 tokens lost, and with them each one's end token: d.jsonl:2 (7), d.jsonl:3 (6)",
        "1 sample left out, for the prompt fills the context: d.jsonl:3",
    ]


def test_rows_held_out_are_drawn_by_the_seed() -> None:
    rows, path = list(range(20)), Path("d.jsonl")
    train, valid = held_out(rows, 0.25, 3, path, last=False)
    assert (len(train), len(valid)) == (15, 5)
    assert sorted(train + valid) == rows
    assert (train, valid) == (sorted(train), sorted(valid))
    assert held_out(rows, 5, 3, path, last=False) == (train, valid)
    assert held_out(rows, 5, 4, path, last=False) != (train, valid)
    assert held_out(rows, 0.001, 3, path, last=False)[1] == held_out(rows, 1, 3, path, last=False)[1]
    assert held_out(rows, 2, 3, path, last=True) == (rows[:-2], [18, 19])


def test_held_out_rows_are_the_same_for_ever() -> None:
    """A resumed run must find the split that it began with."""
    assert held_out(list(range(20)), 4, 0, Path("d.jsonl"), last=False)[1] == [3, 11, 15, 19]


def test_something_must_be_left_to_train_on() -> None:
    with pytest.raises(InputError, match=r"d.jsonl: 2 rows; 2 held out would leave none"):
        held_out([1, 2], 2, 0, Path("d.jsonl"), last=False)
