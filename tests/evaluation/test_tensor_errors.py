"""Errors of stored tensors against gguf's own decoding."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

import quantlab
from quantlab.checkpoint.export import export_checkpoint
from quantlab.errors import InputError
from quantlab.evaluation.tensor_errors import tensor_errors


@pytest.mark.parametrize("gguf", [False, True], ids=["folder", "gguf"])
def test_they_are_norms_of_differences(llama_model: Path, float_twin, tmp_path: Path, gguf: bool) -> None:
    """For every matrix; also if one of the two is a GGUF file, whose rows lie in another order."""
    quantlab.quantize_checkpoint(llama_model, tmp_path / "q4_1", format="q4_1")
    twin = dict(float_twin(tmp_path / "q4_1").named_parameters())
    model = tmp_path / "q4_1"
    if gguf:
        model = tmp_path / "model.gguf"
        export_checkpoint(tmp_path / "q4_1", model, "gguf")
    found = {error.name: error for error in tensor_errors(llama_model, model)}
    plain = {name: tensor for name, tensor in load_file(llama_model / "model.safetensors").items() if tensor.ndim == 2}
    assert set(found) == set(plain)
    for name, tensor in plain.items():
        expected = ((tensor - twin[name].detach()).double().norm() / tensor.double().norm()).item()
        assert found[name].relative_error == pytest.approx(expected, rel=1e-6)
    down = found["model.layers.1.mlp.down_proj.weight"]
    assert (down.layer, down.kind, down.format) == (1, "mlp.down_proj", "q4_1")
    embedding = found["model.embed_tokens.weight"]
    assert (embedding.layer, embedding.kind, embedding.format) == (None, "embed_tokens", "q8_0")


def test_the_same_weights_have_no_error(llama_model: Path) -> None:
    assert {error.relative_error for error in tensor_errors(llama_model, llama_model)} == {0.0}


def test_other_shapes_are_refused(make_model, llama_model: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", "llama", intermediate_size=64)
    with pytest.raises(
        InputError, match=r"tensor model.layers.0.mlp.down_proj.weight has shapes \[64, 96\] and \[64, 64\]"
    ):
        tensor_errors(llama_model, other)
