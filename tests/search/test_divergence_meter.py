"""Divergence of candidates, against the evaluation's own; bounds against printed tables."""

from __future__ import annotations

import math

import numpy as np
import pytest

from quantlab import open_checkpoint, quantize_checkpoint
from quantlab.checkpoint import load_tokenizer
from quantlab.evaluation.compare import measure
from quantlab.evaluation.windows import text_windows
from quantlab.formats import format_named
from quantlab.quantization.stored import round_stored
from quantlab.search import measuring
from quantlab.search.measuring import Divergence, Meter, student_quantile
from quantlab.search.overlay import OverlaidCheckpoint


@pytest.fixture(scope="module")
def text(prose, tmp_path_factory):
    """The beginning of the prose, for speed."""
    path = tmp_path_factory.mktemp("text") / "short.txt"
    path.write_text(prose.read_text(encoding="utf-8")[:3000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def packed(llama_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "q4_0"
    quantize_checkpoint(llama_model, out, format="q4_0", uniform=True)
    return out


def windows_of(model, text):
    return [window.ids for window in text_windows(text, load_tokenizer(model), 64)]


@pytest.mark.parametrize("kept", [0, 1 << 30])
def test_equals_what_compare_reports(llama_model, packed, text, monkeypatch, kept):
    monkeypatch.setattr(measuring, "KEPT_LOGITS", kept)  # both ways to come by the reference's logits
    expected = measure(llama_model, packed, text, context=64, engine="native").result
    found = Meter(open_checkpoint(llama_model), windows_of(llama_model, text)).measure(packed)
    assert (found.kld, found.stderr, found.windows) == (expected.kld_mean, expected.kld_stderr, expected.windows)


def test_an_overlay_of_every_tensor_is_the_written_file(float_model, text, tmp_path):
    quantize_checkpoint(float_model, tmp_path / "q5_1", format="q5_1", uniform=True)
    base, written = open_checkpoint(float_model), open_checkpoint(tmp_path / "q5_1")
    format = format_named("q5_1")
    packed = [name for name in written.names if written.format(name) is not None]
    overlay = OverlaidCheckpoint(base, {name: (format, round_stored(base, name, format)[0]) for name in packed})
    for name in packed:
        assert np.array_equal(overlay.read_bytes(name), written.read_bytes(name))
        assert overlay.shape(name) == base.shape(name)
    meter = Meter(base, windows_of(float_model, text))
    found = meter.measure(overlay)
    assert found == meter.measure(tmp_path / "q5_1")
    assert found.kld > 0
    assert meter.measure(OverlaidCheckpoint(base, {})).kld == 0


# One-sided 95 % points of Student's t (Abramowitz and Stegun, table 26.10).
@pytest.mark.parametrize(
    ("freedom", "value"), [(3, 2.353), (5, 2.015), (10, 1.812), (15, 1.753), (30, 1.697), (120, 1.658)]
)
def test_students_quantiles_are_those_of_the_table(freedom, value):
    assert student_quantile(0.95, freedom) == pytest.approx(value, rel=0.006 if freedom < 5 else 0.0015)


def test_one_window_bounds_nothing():
    assert math.isinf(Divergence(0.1, 0.01, 1).upper_bound())
    assert Divergence(0.1, 0.01, 31).upper_bound() == pytest.approx(0.1 + 0.01697, abs=2e-5)
