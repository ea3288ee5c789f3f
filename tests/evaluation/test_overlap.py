"""Scoring a model on its own calibration text is said, on other text it is not."""

from __future__ import annotations

import logging
from pathlib import Path

from quantlab import quantize_checkpoint
from quantlab.calibration.calibrated import CalibrationOptions
from quantlab.calibration.samples import CalibrationRequest
from quantlab.evaluation.compare import measure
from quantlab.evaluation.perplexity import perplexity

PROSE = Path(__file__).parents[1] / "data" / "prose.txt"


def test_calibration_text_that_comes_back_is_noticed(llama_model, tmp_path, caplog):
    used = tmp_path / "used.txt"
    used.write_text(PROSE.read_text(encoding="utf-8")[:9000], encoding="utf-8")
    other = tmp_path / "other.txt"
    other.write_text(PROSE.read_text(encoding="utf-8")[-4000:], encoding="utf-8")
    options = CalibrationOptions(request=CalibrationRequest(used, samples=8, length=64))
    packed = tmp_path / "packed"
    quantize_checkpoint(llama_model, packed, method="search", calibration=options, threads=1)
    with caplog.at_level(logging.WARNING):
        perplexity(packed, other, context=64)
        assert not caplog.messages
        perplexity(packed, used, context=64)
        measure(llama_model, packed, used, context=64)
    assert len(caplog.messages) == 2
    assert all(str(packed) in message and "of the calibration text's windows" in message for message in caplog.messages)
