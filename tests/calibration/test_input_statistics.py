"""The second moments of a model's own inputs, against transformers' forward pass."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from quantlab.calibration.input_statistics import MODEL_ITSELF, collect_statistics
from quantlab.calibration.quantize import quantize_checkpoint
from quantlab.calibration.samples import CalibrationRequest, open_calibration
from quantlab.calibration.vocabulary import head_name
from quantlab.checkpoint import open_checkpoint
from quantlab.errors import InputError


@pytest.fixture(scope="module")
def asked(prose: Path) -> CalibrationRequest:
    return CalibrationRequest(prose, 8, 64)


def inputs_of(folder: Path, request: CalibrationRequest) -> dict[str, np.ndarray]:
    """By weight: the mean of x x^T in transformers' own forward pass, window by window."""
    from transformers import AutoModelForCausalLM

    live = AutoModelForCausalLM.from_pretrained(folder).eval()
    sums: dict[str, np.ndarray] = {}

    def note(name: str):
        def hook(module, arguments, output) -> None:
            rows = arguments[0].detach().double().reshape(-1, arguments[0].shape[-1]).numpy()
            sums[name] = sums.get(name, 0) + rows.T @ rows

        return hook

    for name, module in live.named_modules():
        if type(module).__name__ in ("Linear", "Conv1D"):
            module.register_forward_hook(note(f"{name}.weight"))
    samples = open_calibration(open_checkpoint(folder), request)
    with torch.no_grad():
        for window in samples.windows:
            live(torch.tensor([window]))
    return {name: total / samples.tokens for name, total in sums.items()}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_they_are_the_second_moments_of_the_models_own_inputs(
    family: str, make_model, asked: CalibrationRequest, tmp_path: Path
) -> None:
    model, place = make_model(tmp_path / "m", family, tied=family == "gpt2"), tmp_path / "s" / "s.safetensors"
    checkpoint = open_checkpoint(model)
    place.parent.mkdir()
    said: list[int] = []
    file = collect_statistics(
        checkpoint, place, request=asked, activations="float", threads=1, progress=lambda done, *_: said.append(done)
    )
    assert list(place.parent.iterdir()) == [place]
    assert said == [0, 0, 1, 2]
    assert (file.method, file.is_full) == (MODEL_ITSELF, True)
    wanted = inputs_of(model, asked)
    wanted[head_name(checkpoint)] = wanted.pop("lm_head.weight")
    assert set(file.layers) == set(wanted)
    for name, expected in wanted.items():
        found = file.statistics(name).second_moment
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_packed_models_are_measured_as_they_are(llama_model: Path, asked: CalibrationRequest, tmp_path: Path) -> None:
    quantize_checkpoint(llama_model, tmp_path / "packed", format="q4_0", uniform=True)
    packed = collect_statistics(
        open_checkpoint(tmp_path / "packed"), tmp_path / "p.safetensors", request=asked, threads=1
    )
    plain = collect_statistics(open_checkpoint(llama_model), tmp_path / "f.safetensors", request=asked, threads=1)
    name = "model.layers.1.mlp.up_proj.weight"
    one, two = packed.statistics(name).second_moment, plain.statistics(name).second_moment
    assert 0.001 < float((one - two).norm() / two.norm()) < 0.5


def test_the_bytes_do_not_depend_on_threads(llama_model: Path, asked: CalibrationRequest, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(llama_model)
    for threads in (1, 3):
        collect_statistics(checkpoint, tmp_path / f"{threads}.safetensors", request=asked, threads=threads)
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "3.safetensors").read_bytes()
    with pytest.raises(InputError, match="exists already"):
        collect_statistics(checkpoint, tmp_path / "1.safetensors", request=asked)
