"""Ternary weights from `quantize` to `perplexity`, as a user types it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantlab.checkpoint.gguf_file import GgufFile

Run = Callable[..., Any]  # see conftest.py
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def wide(make_model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose rows are whole ternary blocks."""
    return make_model(tmp_path_factory.mktemp("wide"), "llama", num_hidden_layers=1, **SIZES)


def test_a_ternary_model_goes_wherever_models_go(run: Run, wide: Path, prose: Path, tmp_path: Path) -> None:
    packed, file = tmp_path / "packed", tmp_path / "packed.gguf"
    report = run("quantize", wide, packed, "-f", "ternary", "--json").json
    inspected = run("inspect", packed, "--json").json
    assert [t["format"] for t in inspected["tensors"]].count("tq2_0") == 7
    assert inspected["bits_per_weight"] == report["bits_per_weight"]
    exported = run("export", packed, file, "--to", "gguf", "--json").json
    assert (exported["lossless"], exported["tensors_changed"]) == (True, 0)
    assert GgufFile(file).metadata["general.file_type"] == 37  # llama.h: MOSTLY_TQ2_0
    for model in (packed, file):
        assert run("verify", model, "--source", wide, "--json").json["ok"]
    text = tmp_path / "text.txt"
    text.write_text(prose.read_text(encoding="utf-8")[:600], encoding="utf-8")
    common = ("--context", 64, "--engine", "torch", "-t", 1, "--json")
    from_folder = run("perplexity", packed, text, *common).json
    assert run("perplexity", file, text, *common).json == from_folder
    result = run("compare", wide, packed, text, *common).json
    assert result["perplexity_b"] == pytest.approx(from_folder["perplexity"], rel=1e-6)
    assert result["kld_mean"] > 0.1  # rounding alone does not make a ternary model


def test_what_ternary_weights_cannot_have(refusal: Callable[..., str], wide: Path, tmp_path: Path) -> None:
    for options, message in (
        (("--method", "search"), "--method search needs blocks with scales of their own, and tq2_0 has one a tensor"),
        (("--levels", 2), "tq2_0 cannot use 2 levels: it has 3; leave out the levels"),
    ):
        assert message in refusal("quantize", wide, tmp_path / "out", "-f", "ternary", *options)
    assert list(tmp_path.iterdir()) == []
