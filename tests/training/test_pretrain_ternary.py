"""Pretraining through ternary blocks: the written folder is what was trained, resumes, and generates."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_pretraining import RECIPE, STEP

import quantlab
from quantlab.checkpoint import open_checkpoint
from quantlab.errors import InputError
from quantlab.formats import format_named
from quantlab.training.corpus import read_documents
from quantlab.training.pretrain import PretrainResult, pretrain
from quantlab.training.recipe_file import Quantization, Schedule, read_pretrain_recipe

TERNARY = format_named("ternary")
SHAPE = {**RECIPE["model"], "hidden_size": 256, "intermediate_size": 256}
SCHEDULE = {**RECIPE["schedule"], "tokens": 10 * STEP, "optimizer": "adamw", "learning_rate": 4e-3, "save_every": 4}


def write_recipe(folder: Path, quantization: Any = None, **schedule: Any) -> Path:
    recipe = {"model": SHAPE, "vocabulary": RECIPE["vocabulary"], "schedule": {**SCHEDULE, **schedule}}
    if quantization is not None:
        recipe["quantization"] = quantization
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, prose: Path) -> tuple[Path, PretrainResult]:
    folder = tmp_path_factory.mktemp("ternary")
    return folder / "out", pretrain(write_recipe(folder), prose, folder / "out", format="ternary")


def test_it_learns_and_the_folder_has_the_loss_of_the_training(trained, prose: Path) -> None:
    """The loss again from the files, with int8 activations: windows over <s> text </s>, each after a start token."""
    out, result = trained
    assert (result.steps, result.format) == (10, "tq2_0")
    assert result.eval_loss < math.log(400) - 0.3
    tokenizer = quantlab.load_tokenizer(out)
    stream = [1, *tokenizer.encode(read_documents(prose)[0], add_special_tokens=False), 2]
    windows = torch.tensor([[1, *stream[start : start + 127]] for start in range(0, len(stream) - 126, 127)])
    with torch.no_grad():
        logits = quantlab.load_model(out, activations="int8")(windows, use_cache=False).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
    assert result.eval_loss == pytest.approx(float(expected), abs=2e-6)


def test_linear_layers_are_ternary_and_nothing_else_is_packed(trained) -> None:
    out, _ = trained
    checkpoint = open_checkpoint(out)
    stored = load_file(out / "model.safetensors")
    for name, weight in stored.items():
        if name.endswith("_proj.weight"):
            assert checkpoint.format(name) == TERNARY
            values = checkpoint.read(name).unique().tolist()
            assert len(values) <= 3
            assert 0 in values
        else:
            assert weight.dtype == torch.float16
            assert checkpoint.format(name) is None
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (config["method"], config["pretrain"]) == ("pretrain", {"steps": 10, "stages": 2})


def test_it_generates(trained) -> None:
    """By the native engine, whose logits are those of the layers that trained."""
    out, _ = trained
    engine = quantlab.load_engine(out, threads=1, context=64, kv="f32", activations="int8")
    ids = engine.tokenizer.encode("The river and the lamp")
    engine.prefill(ids)
    with torch.no_grad():
        expected = quantlab.load_model(out, activations="int8")(torch.tensor([ids])).logits[0, -1]
    torch.testing.assert_close(torch.from_numpy(engine.logits().copy()), expected, rtol=1e-3, atol=1e-3)
    assert len(list(engine.decode(quantlab.SamplingParams(temperature=0.0), 4))) > 0


class InterruptedRun(Exception):  # noqa: N818 it is no error
    """Stands for whatever stops a run."""


def test_a_resumed_run_ends_in_the_same_bytes(trained, prose: Path, tmp_path: Path) -> None:
    """Stopped in the first stage, resumed into the second; another format is another run."""

    def stop(done: int, *_: object) -> None:
        if done >= 5 * STEP:
            raise InterruptedRun

    recipe = write_recipe(tmp_path)
    with pytest.raises(InterruptedRun):
        pretrain(recipe, prose, tmp_path / "out", format="ternary", progress=stop)
    for wrong in ({"format": "q4_1"}, {"format": "float"}, {"format": "ternary", "tokens": 12 * STEP}):
        with pytest.raises(InputError, match=r"another .*(schedule|quantization)"):
            pretrain(recipe, prose, tmp_path / "out", resume=True, **wrong)
    result = pretrain(recipe, prose, tmp_path / "out", resume=True, format="ternary")
    out, whole = trained
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert result.eval_loss == whole.eval_loss


@pytest.mark.parametrize(
    ("format", "words"),
    [
        ("ternary", "after 6 steps: .*q_proj.weight: row 0, column 0 is nan.*checkpoint-4"),
        ("float", "after 8 steps: .*weight holds NaN or infinity; the last good checkpoint is .*checkpoint-4"),
    ],
)
def test_a_diverging_run_stops_and_says_where(format, words, prose: Path, tmp_path: Path, monkeypatch) -> None:
    """What blocks cannot hold shows at once, a float model's NaN when it would be saved."""
    from transformers import Trainer

    from quantlab.training.failures import TrainingFailedError

    original = Trainer.training_step

    def poisoned(self, model, *arguments, **options):
        if self.state.global_step == 6:
            with torch.no_grad():
                next(p for name, p in model.named_parameters() if "q_proj" in name).fill_(float("nan"))
        return original(self, model, *arguments, **options)

    monkeypatch.setattr(Trainer, "training_step", poisoned)
    with pytest.raises(TrainingFailedError, match=rf"{words}; lower schedule.learning_rate"):
        pretrain(write_recipe(tmp_path), prose, tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_no_number_stops_when_it_is_logged() -> None:
    from quantlab.training.failures import TrainingFailedError
    from quantlab.training.pretraining_trainer import _Report

    report = _Report(Schedule(tokens=100, context=10, batch_tokens=10, learning_rate=1.0), None)
    report.on_log(None, None, None, logs={"loss": 2.0})
    with pytest.raises(TrainingFailedError, match="no number"):
        report.on_log(None, None, None, logs={"loss": math.nan})


def test_a_recipe_names_formats_of_linear_layers_and_vocabulary(prose: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, {"format": "q4_1", "vocabulary": "q8_0"}, tokens=2 * STEP, optimizer="muon")
    pretrain(recipe, prose, tmp_path / "out")
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.format("model.embed_tokens.weight") == format_named("q8_0")
    assert checkpoint.format("model.layers.1.mlp.down_proj.weight") == format_named("q4_1")


def test_stages_and_formats_of_a_recipe(tmp_path: Path) -> None:
    plain = read_pretrain_recipe(write_recipe(tmp_path))
    assert (plain.quantization, plain.schedule.stages) == (None, 0)
    assert plain.with_format(None).schedule.stages == 1
    ternary = plain.with_format("Ternary")
    assert (ternary.quantization, ternary.schedule.stages) == (Quantization("tq2_0"), 2)
    assert ternary.with_format("float").quantization is None
    named = read_pretrain_recipe(write_recipe(tmp_path, {"format": "ternary", "vocabulary": "q8_0"}, stages=1))
    assert named.with_format(None).schedule.stages == 1
    assert named.with_format("q4_0").quantization == Quantization("q4_0", "q8_0")


def test_long_windows_come_in_the_second_half() -> None:
    schedule = Schedule(tokens=100, context=10, batch_tokens=10, learning_rate=1.0, decay=0.2)
    assert schedule.short_steps == 8
    assert Schedule(tokens=100, context=10, batch_tokens=10, learning_rate=1.0, stages=2).short_steps == 5


@pytest.mark.parametrize(
    ("quantization", "fault"),
    [
        ("ternary", "quantization: must be a mapping"),
        ({}, "quantization: missing fields format"),
        ({"format": "q9"}, "quantization: unknown format 'q9'"),
        ({"format": 3}, "quantization.format: must be a name, not 3"),
        ({"format": "ternary", "vocabulary": "q9"}, "quantization: unknown format 'q9'"),
        ({"format": "ternary", "activations": "int4"}, "quantization.activations must be auto, int8 or float"),
        ({"format": "ternary", "levels": 3}, "quantization: unknown fields levels"),
    ],
    ids=str,
)
def test_a_wrong_quantization_is_named(quantization: Any, fault: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        read_pretrain_recipe(write_recipe(tmp_path, quantization))
    assert str(caught.value).startswith(f"{tmp_path}/recipe.yaml: {fault}")


def test_a_wrong_number_of_stages_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"schedule\.stages must be 1 or 2"):
        read_pretrain_recipe(write_recipe(tmp_path, stages=3))


def test_sizes_that_blocks_do_not_divide_are_refused(prose: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({**RECIPE, "model": {**SHAPE, "intermediate_size": 320}}))
    with pytest.raises(InputError, match=r"mlp.down_proj.weight has rows of 320 weights, and a tq2_0 block takes 256"):
        pretrain(file, prose, tmp_path / "out", format="ternary")
    assert [entry.name for entry in tmp_path.iterdir()] == ["recipe.yaml"]


def test_the_shipped_recipe_reads() -> None:
    """models/recipes/bitnet-5m.yaml: ternary in two stages, sizes that blocks divide."""
    recipe = read_pretrain_recipe(Path(__file__).parents[2] / "models" / "recipes" / "bitnet-5m.yaml").with_format(None)
    assert (recipe.quantization, recipe.schedule.stages) == (Quantization("tq2_0"), 2)
    assert [recipe.model[name] % TERNARY.block_size for name in ("hidden_size", "intermediate_size")] == [0, 0]
    assert recipe.with_format("float").schedule == recipe.schedule
