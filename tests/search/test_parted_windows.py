"""Text to choose by, to judge by and to calibrate with: never the same."""

from __future__ import annotations

import pytest

from quantlab import InputError, open_checkpoint
from quantlab.calibration.samples import CalibrationRequest, open_calibration
from quantlab.search.windows import HELD_OUT_WINDOWS, SENSITIVITY_WINDOWS, measuring_text


def test_the_three_kinds_are_disjoint(llama_model, prose):
    checkpoint = open_checkpoint(llama_model)
    text = measuring_text(checkpoint, CalibrationRequest(prose, samples=12, length=32), calibrates=True)
    calibration = open_calibration(checkpoint, text.calibration).windows
    kinds = [set(text.sensitivity), set(text.held_out), set(calibration)]
    assert len(set.union(*kinds)) == sum(map(len, kinds))
    assert text.calibration.samples == 12
    for windows, wanted in ((text.sensitivity, SENSITIVITY_WINDOWS), (text.held_out, HELD_OUT_WINDOWS)):
        assert 32 * wanted <= sum(map(len, windows)) < 32 * (wanted + 1)


def test_a_short_text_is_shared(llama_model, prose, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text(prose.read_text(encoding="utf-8")[:8000], encoding="utf-8")
    checkpoint = open_checkpoint(llama_model)
    text = measuring_text(checkpoint, CalibrationRequest(path, length=64), calibrates=True)
    calibration = open_calibration(checkpoint, text.calibration)
    assert not set(calibration.windows) & {*text.sensitivity, *text.held_out}
    assert text.calibration.samples < 128
    assert any("the text is short" in note for note in text.notes)


def test_without_calibration_all_text_measures(llama_model, prose):
    text = measuring_text(open_checkpoint(llama_model), CalibrationRequest(prose, length=32), calibrates=False)
    assert text.calibration is None
    assert not set(text.sensitivity) & set(text.held_out)


def test_too_little_text_is_refused(llama_model, prose, tmp_path):
    path = tmp_path / "tiny.txt"
    path.write_text(prose.read_text(encoding="utf-8")[:2000], encoding="utf-8")
    with pytest.raises(InputError, match=r"tiny\.txt: too short to measure with: .* give --calibration more text"):
        measuring_text(open_checkpoint(llama_model), CalibrationRequest(path, length=128), calibrates=False)


def test_another_seed_draws_other_windows(llama_model, prose):
    checkpoint = open_checkpoint(llama_model)
    texts = [measuring_text(checkpoint, CalibrationRequest(prose, length=16, seed=s), calibrates=False) for s in (0, 5)]
    assert texts[0].sensitivity != texts[1].sensitivity
