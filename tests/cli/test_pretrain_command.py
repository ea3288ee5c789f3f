"""`quantlab pretrain`: what reaches the library, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantlab.training import pretrain as training


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "model: {model_type: llama, hidden_size: 64, intermediate_size: 96, num_hidden_layers: 1, "
        "num_attention_heads: 2, num_key_value_heads: 2, max_position_embeddings: 64}\n"
        "vocabulary: {size: 400}\n"
        "schedule: {tokens: 2048, context: 64, batch_tokens: 1024, micro_batch_tokens: 1024, learning_rate: 1e-3}\n"
    )
    return file


def test_options_reach_the_run(run, recipe: Path, prose: Path, tmp_path: Path, monkeypatch) -> None:
    given: dict[str, Any] = {}

    def pretrain(*places: Path, **options: Any) -> training.PretrainResult:
        given.update(options, places=places)
        return training.PretrainResult(2, 1.0, 1.5, 10.0, 1000, 2048, "tq2_0")

    monkeypatch.setattr(training, "pretrain", pretrain)
    out = tmp_path / "out"
    out.mkdir()
    (out / "training_log.json").write_text('[{"step": 2, "loss": 1.0}]')
    found = run("pretrain", recipe, prose, out, "--format", "ternary", "--tokens", 512, "--seed", 3, "--json").json
    assert (found["steps"], found["train_loss"], found["eval_loss"], found["format"]) == (2, 1.0, 1.5, "tq2_0")
    assert given["places"] == (recipe, prose, out)
    assert (given["format"], given["tokens"], given["seed"], given["resume"]) == ("ternary", 512, 3, False)


@pytest.mark.parametrize(
    ("format", "fault"),
    [("q9", "unknown format 'q9'; choose one of: q4_0"),
     ("ternary", "has rows of 64 weights, and a tq2_0 block takes 256")],
)  # fmt: skip
def test_formats_that_cannot_be(
    refusal: Callable[..., str], recipe: Path, prose: Path, tmp_path: Path, format: str, fault: str
) -> None:
    line = refusal("pretrain", recipe, prose, tmp_path / "out", "--format", format)
    assert fault in line
    assert [entry.name for entry in tmp_path.iterdir()] == ["recipe.yaml"]
