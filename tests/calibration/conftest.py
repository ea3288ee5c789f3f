"""Calibrated quantization of tiny models."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantlab import quantize_checkpoint
from quantlab.calibration.calibrated import CalibrationOptions
from quantlab.calibration.quantize import QuantizeReport
from quantlab.calibration.samples import CalibrationRequest


@pytest.fixture(scope="session")
def request_() -> CalibrationRequest:
    prose = Path(__file__).parents[1] / "data" / "prose.txt"
    return CalibrationRequest(prose, samples=24, length=64)


@pytest.fixture
def quantize(request_):
    """A function (model, out, method, calibration options ..., quantize options) -> report."""

    def run(model: Path, out: Path, method: str = "gptq", *, threads: int = 1, **options) -> QuantizeReport:
        own = {key: options.pop(key) for key in list(options) if key in CalibrationOptions.__dataclass_fields__}
        if "statistics" not in own:
            own.setdefault("request", request_)
        calibration = CalibrationOptions(**own)
        return quantize_checkpoint(model, out, method=method, calibration=calibration, threads=threads, **options)

    return run


@pytest.fixture(scope="session")
def untied(make_model, tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("untied"), "llama", tied=False)
