"""The sketch of a calibration text: how much of it another text repeats."""

from __future__ import annotations

import random

import pytest

from quantlab.calibration.fingerprint import KEPT, WINDOW, fingerprint, overlap, overlap_note, window_hashes


def tokens(count: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(1000) for _ in range(count)]


def test_a_text_overlaps_itself_and_no_other():
    text = tokens(500, 0)
    hashes = fingerprint([text])
    assert len(hashes) == len(set(hashes)) == 500 - WINDOW + 1
    assert overlap(hashes, [text]) == 1
    assert overlap(hashes, [tokens(500, 1)]) == 0


def test_where_a_window_lies_does_not_matter_but_its_order_does():
    window = tokens(WINDOW, 2)
    hashes = fingerprint([window])
    assert overlap(hashes, [[*tokens(20, 3), *window, *tokens(5, 4)]]) == 1
    assert overlap(hashes, [list(reversed(window))]) == 0


def test_large_texts_keep_a_fair_sample():
    """Of a text of which a quarter comes back, about a quarter of the kept windows do (a binomial's 4 sigma: 4 %)."""
    text = tokens(40_000, 5)
    hashes = fingerprint([text])
    assert len(hashes) == KEPT
    assert hashes == tuple(sorted(hashes))
    assert overlap(hashes, [text[10_000:20_000]]) == pytest.approx(0.25, abs=0.04)


def test_the_hash_is_the_polynomial_and_the_finalizer_of_its_description():
    """Computed with Python's integers; a file made by one version is read by the next."""
    window, mask = tokens(WINDOW, 6), 2**64 - 1
    value = 0
    for token in window:
        value = (value * 0x9E3779B97F4A7C15 + token + 1) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    assert window_hashes([window]).tolist() == [value ^ (value >> 31)]


def test_texts_shorter_than_a_window_have_no_fingerprint():
    assert fingerprint([tokens(WINDOW - 1, 7), []]) == ()
    assert overlap((), [tokens(50, 8)]) == 0


def test_the_note_names_the_share():
    text = tokens(500, 9)
    record = {"fingerprint": list(fingerprint([text]))}
    note = overlap_note(record, [text])
    assert note == "100% of the calibration text's windows occur in this text: the result flatters the quantized model"
    assert overlap_note(record, [tokens(500, 10)]) is None


@pytest.mark.parametrize("record", [None, {}, {"fingerprint": "no list"}, {"fingerprint": ["no digits"]}])
def test_models_without_a_fingerprint_get_no_note(record):
    assert overlap_note(record, [tokens(100, 11)]) is None
