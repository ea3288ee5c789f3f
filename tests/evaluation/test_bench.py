"""Numbers of a benchmark: counts are exact, speeds are there and make sense together."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantlab import InputError, quantize_checkpoint
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
    fraction = result.decode_tokens_per_second * packed / (result.read_bandwidth_gbps * 1e9)
    assert result.bandwidth_fraction == pytest.approx(fraction)
    assert result.peak_rss_bytes > 1 << 20


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
