"""RegMean's Gram matrices: which file serves which model, and what a tied matrix counts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from quantlab.calibration.calibrated import CalibrationOptions
from quantlab.calibration.quantize import quantize_checkpoint
from quantlab.calibration.samples import CalibrationRequest
from quantlab.checkpoint import open_checkpoint
from quantlab.errors import InputError
from quantlab.merging.grams import MergeGrams, ModelGrams, open_grams
from quantlab.merging.methods.method import merge_tensor
from quantlab.merging.methods.table import METHODS

EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def asked(prose: Path) -> CalibrationRequest:
    return CalibrationRequest(prose, 8, 64)


@pytest.fixture(scope="module")
def collected(llama_model: Path, asked: CalibrationRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("grams") / "s.safetensors"
    open_grams(open_checkpoint(llama_model), request=asked, collect_to=place, threads=1)
    return place


def test_linear_weights_have_them_and_a_tied_head_counts_as_embedding_too(llama_model: Path, collected: Path) -> None:
    grams = open_grams(open_checkpoint(llama_model), statistics=collected)
    assert grams.gram("model.layers.0.mlp.down_proj.weight").shape == (96, 96)
    assert grams.gram("model.norm.weight") is None
    stored = grams.file.statistics(EMBEDDING).second_moment
    torch.testing.assert_close(grams.gram(EMBEDDING), stored + stored.diagonal().mean() * torch.eye(64))


def test_an_untied_embedding_has_none(make_model, asked: CalibrationRequest, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_model(tmp_path / "m", "llama", tied=False, num_hidden_layers=1))
    grams = open_grams(checkpoint, request=asked, collect_to=tmp_path / "s.safetensors", threads=1)
    assert grams.gram(EMBEDDING) is None
    assert torch.equal(grams.gram("lm_head.weight"), grams.file.statistics("lm_head.weight").second_moment)


def test_a_merge_asks_for_one_model_after_the_other(
    llama_model: Path, collected: Path, asked: CalibrationRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, before = open_checkpoint(llama_model), collected.stat().st_mtime_ns
    grams = open_grams(checkpoint, request=asked, collect_to=collected)  # is there already
    assert collected.stat().st_mtime_ns == before
    read: list[str] = []
    gram = ModelGrams.gram
    monkeypatch.setattr(ModelGrams, "gram", lambda self, name: read.append(name) or gram(self, name))
    name = "model.layers.0.mlp.down_proj.weight"
    plan = SimpleNamespace(parts=[SimpleNamespace(model=m, name=name) for m in ("a", "b", "c")])
    found = MergeGrams({"a": grams, "b": open_grams(checkpoint, statistics=collected)}).of(plan)
    assert (len(found), read) == (3, [])
    assert torch.equal(found[0], found[1])
    assert found[2] is None
    assert read == [name, name]
    weight = checkpoint.read(name, torch.float32)
    merged = merge_tensor(METHODS["regmean"], None, [weight, 2 * weight], {"damping": 0.0}, grams=found[:2])
    torch.testing.assert_close(merged, 1.5 * weight, rtol=1e-4, atol=1e-5)  # equal moments: the mean


def test_gptqs_statistics_serve_and_partial_ones_do_not(
    llama_model: Path, collected: Path, asked: CalibrationRequest, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(llama_model)
    for method in ("gptq", "search"):
        options = CalibrationOptions(request=asked, statistics_out=tmp_path / f"{method}.safetensors")
        quantize_checkpoint(llama_model, tmp_path / method, method=method, calibration=options, threads=1)
    grams = open_grams(checkpoint, statistics=tmp_path / "gptq.safetensors")
    assert grams.gram("model.layers.1.self_attn.q_proj.weight").shape == (64, 64)
    ours = CalibrationOptions(statistics=collected)
    quantize_checkpoint(llama_model, tmp_path / "ours", method="gptq", calibration=ours, threads=1)
    with pytest.raises(InputError, match="parts of second moments"):
        open_grams(checkpoint, statistics=tmp_path / "search.safetensors")
    with pytest.raises(InputError, match="another model"):
        open_grams(open_checkpoint(tmp_path / "gptq"), statistics=tmp_path / "gptq.safetensors")
    with pytest.raises(InputError, match="give a file"):
        open_grams(checkpoint)
