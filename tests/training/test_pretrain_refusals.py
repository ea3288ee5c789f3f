"""Pretraining from a recipe: what cannot be is refused at once and spoils nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_pretraining import GPT2, RECIPE, Run, write_recipe

from quantlab.errors import InputError
from quantlab.training.pretrain import pretrain


def test_unfinished_work_needs_resume(run: Run, tmp_path: Path) -> None:
    """A folder OUT.training is neither continued nor overwritten unasked; the line says how to go on."""
    work = tmp_path / "out.training"
    work.mkdir()
    (work / "mark").touch()
    with pytest.raises(InputError, match=r"out\.training: holds an unfinished run; continue it with --resume"):
        pretrain(run.recipe, run.corpus, tmp_path / "out")
    assert [file.name for file in work.iterdir()] == ["mark"]


def test_an_existing_out_is_refused(run: Run) -> None:
    """Even with resume: a finished model is not overwritten."""
    before = (run.out / "model.safetensors").stat().st_mtime_ns
    for resume in (False, True):
        with pytest.raises(InputError, match="out: exists already"):
            pretrain(run.recipe, run.corpus, run.out, resume=resume)
    assert (run.out / "model.safetensors").stat().st_mtime_ns == before
    assert not run.out.with_name("out.training").exists()


@pytest.mark.parametrize(
    ("recipe", "fault"),
    [
        ({"model": {**RECIPE["model"], "hidden_size": 66}}, "recipe.yaml: model: transformers refuses it: "),
        ({"model": {**RECIPE["model"], "hidden_size": "wide"}}, "recipe.yaml: model: transformers refuses it: "),
        ({"model": {**RECIPE["model"], "num_attention_heads": 0}}, "recipe.yaml: model: transformers refuses it: "),
        ({"model": {**RECIPE["model"], "num_key_value_heads": 3}}, "recipe.yaml: model: transformers refuses it: "),
        ({"model": {**RECIPE["model"], "vocab_size": 9}}, "recipe.yaml: model: transformers refuses it: "),
        ({"model": {**RECIPE["model"], "hidden_layers": 2}}, "recipe.yaml: model: unknown fields hidden_layers"),
        ({"context": 256}, "recipe.yaml: schedule.context 256 exceeds model.max_position_embeddings, 128"),
        ({"model": GPT2, "context": 256}, "recipe.yaml: schedule.context 256 exceeds"),
    ],
)
def test_a_model_that_cannot_be_is_refused_before_any_work(
    tmp_path: Path, prose: Path, recipe: dict[str, Any], fault: str
) -> None:
    """Shapes that do not fit, misspelt fields, windows longer than the model: one line, and no OUT.training."""
    file = write_recipe(tmp_path, **recipe)
    with pytest.raises(InputError) as caught:
        pretrain(file, prose, tmp_path / "out")
    assert str(caught.value).startswith(f"{tmp_path}/{fault}")
    assert "\n" not in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize(
    ("files", "fault"),
    [
        ({}, "corpus: holds no train.txt"),
        ({"train.txt": ""}, "train.txt: holds no text"),
        ({"train.txt": "one document only\n" * 400}, "train.txt: one document cannot be split"),
        ({"train.txt": "few words\n<|endoftext|>\nhere"}, "no vocabulary of 400 pieces"),
        ({"train.txt": None, "validation.txt": "short"}, "the validation text has"),
        ({"train.txt": None, "test.txt": "short"}, "the test text has"),
    ],
)
def test_a_text_that_cannot_be_used_leaves_nothing_behind(
    tmp_path: Path, prose: Path, files: dict[str, str | None], fault: str
) -> None:
    """Missing, empty or too short a text (None stands for the prose): one line, and no OUT.training to clear away."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for name, content in files.items():
        (corpus / name).write_text(prose.read_text(encoding="utf-8") if content is None else content, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        pretrain(write_recipe(tmp_path), corpus, tmp_path / "out")
    assert fault in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["corpus", "recipe.yaml"]


def test_a_refusal_keeps_the_work_of_an_earlier_run(tmp_path: Path, prose: Path) -> None:
    """What was there before is not cleared away when a resumed run is refused."""
    work = tmp_path / "out.training"
    work.mkdir()
    (work / "mark").touch()
    (tmp_path / "train.txt").write_text("few words\n<|endoftext|>\nhere")
    with pytest.raises(InputError, match="no vocabulary"):
        pretrain(write_recipe(tmp_path), tmp_path / "train.txt", tmp_path / "out", resume=True)
    assert (work / "mark").exists()
