"""Numbers of a benchmark: counts are exact, speeds are there and make sense together."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantlab import InputError, native, quantize_checkpoint
from quantlab.evaluation import bench as evaluation


@pytest.fixture
def small_ruler(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test needs no gigabyte."""
    monkeypatch.setattr(evaluation, "RULER_BYTES", 1 << 22)


@pytest.mark.usefixtures("small_ruler")
def test_what_a_token_reads(llama_model: Path, tmp_path: Path) -> None:
    """All matrices once; of a tied embedding all rows, as the head."""
    report = quantize_checkpoint(llama_model, tmp_path / "packed", uniform=True)
    seen: list[int] = []
    result = evaluation.bench(
        tmp_path / "packed",
        prompt_tokens=20,
        generate_tokens=4,
        threads=2,
        repeat=2,
        progress=lambda *s: seen.append(s[0]),
    )
    packed = sum(t.shape[0] * t.shape[1] for t in report.tensors if t.format == "q4_1") * 20 // 32
    assert result.weight_bytes_per_token == packed
    assert (result.threads, result.engine, seen) == (2, "native", [1, 2])
    low, high = result.decode_spread
    assert 0 < low <= result.decode_tokens_per_second <= high
    assert result.prefill_tokens_per_second > 0
    low, high = result.fraction_spread
    assert 0 < low <= result.bandwidth_fraction <= high
    assert result.peak_rss_bytes > 1 << 20


def test_every_round_has_its_own_ruler(llama_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rulers = iter([4e9, 1e9, 2e9])
    monkeypatch.setattr(native, "read_bandwidth", lambda *_: next(rulers))
    speeds = iter([(1.0, 40.0), (2.0, 30.0), (3.0, 20.0)])
    monkeypatch.setattr(evaluation, "_round", lambda *_: next(speeds))
    result = evaluation.bench(llama_model, prompt_tokens=20, generate_tokens=4, repeat=3)
    assert (result.decode_tokens_per_second, result.read_bandwidth_gbps) == (30.0, 2.0)
    read = result.weight_bytes_per_token
    assert result.bandwidth_fraction == pytest.approx(10e-9 * read)  # of 10, 30 and 10 tokens a GB
    assert result.fraction_spread == pytest.approx((10e-9 * read, 30e-9 * read))


@pytest.mark.usefixtures("small_ruler")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_tokens": 0}, "prompt tokens 0: at least 1 is needed"),
        ({"generate_tokens": 0}, "generate tokens 0: at least 1 is needed"),
        ({"repeat": 0}, "repeat 0: at least 1 is needed"),
        ({"prompt_tokens": 120, "generate_tokens": 9}, "the model's context holds 128 tokens; 129 are asked for"),
    ],
)
def test_numbers_that_make_no_sense(llama_model: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        evaluation.bench(llama_model, **options)
