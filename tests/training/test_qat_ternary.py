"""Quantization-aware training down to ternary: what was trained is what is written, and what cannot be is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tuning_cases import SPEAKING, held_out_loss, write_split

from quantlab.calibration.quantize import quantize_checkpoint
from quantlab.checkpoint import open_checkpoint
from quantlab.errors import InputError
from quantlab.formats import format_named
from quantlab.training.finetune_settings import FinetuneSettings
from quantlab.training.qat import qat
from quantlab.training.qat_settings import TERNARY_RATE, QatSettings

pytest.importorskip("accelerate")

TERNARY = format_named("ternary")
TRAINING = FinetuneSettings(
    rank=4, alpha=8.0, targets="all-linear", context=64, batch_size=2, max_steps=4, learning_rate=2e-3, eval_every=4,
    seed=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_split(tmp_path_factory.mktemp("data"), SPEAKING, 6)


@pytest.fixture(scope="module")
def model(make_model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "llama"
    return make_model(folder, "llama", hidden_size=256, intermediate_size=256)


@pytest.mark.parametrize(
    ("train", "taught"), [("full", False), ("full", True), ("lora", False)], ids=["full", "teacher", "lora"]
)
def test_blocks_and_loss_are_those_of_the_training(train, taught, model, data, tmp_path, monkeypatch) -> None:
    from quantlab.training import qat_writing

    kept, original = {}, qat_writing.write_trained

    def spy(start, trained, plan, *rest):
        kept.update({name: pack() for name, pack in trained.packed.items()}, formats=plan.formats)
        kept["weights"] = {name: p.detach().clone() for name, p in trained.model.named_parameters()}
        return original(start, trained, plan, *rest)

    monkeypatch.setattr(qat_writing, "write_trained", spy)
    rate = 2e-2 if train == "lora" else 2e-3
    result = qat(
        model, data, tmp_path / "out", settings=QatSettings(format="ternary", train=train),
        training=replace(TRAINING, learning_rate=rate), teacher=model if taught else None,
    )  # fmt: skip
    figures = ("kld_before", "kld_after") if taught else ("eval_loss_before", "eval_loss")
    before, after = (getattr(result, name) for name in figures)
    assert after < before
    written = open_checkpoint(tmp_path / "out")
    linear = [name for name, format in kept["formats"].items() if format == TERNARY]
    assert len(linear) == 14
    assert set(linear) == {name for name in written.names if written.format(name) == TERNARY}
    for name in kept["formats"]:
        assert int((written.read_packed(name).blocks != kept[name].blocks).sum()) == 0, name
        if train == "full":
            expected = kept["formats"][name].quantize(kept["weights"][name]).blocks
            assert torch.equal(kept[name].blocks, expected)
    assert held_out_loss(tmp_path / "out", data, "int8") == pytest.approx(result.eval_loss, abs=2e-6)
    quantize_checkpoint(model, tmp_path / "rtn", format="tq2_0")
    assert held_out_loss(tmp_path / "rtn", data, "int8") == pytest.approx(result.eval_loss_before, abs=2e-6)


def test_a_gguf_file_with_all_of_it_ternary(model, data, tmp_path) -> None:
    result = qat(
        model, data, tmp_path / "out.gguf", settings=QatSettings(format="tq2_0", uniform=True), training=TRAINING
    )  # fmt: skip
    written = open_checkpoint(tmp_path / "out.gguf")
    assert written.format(written.family.embedding) == TERNARY
    assert held_out_loss(tmp_path / "out.gguf", data, "int8") == pytest.approx(result.eval_loss, abs=2e-6)


def test_rows_that_are_no_whole_blocks_stay_float(make_model, data, tmp_path) -> None:
    uneven = make_model(tmp_path / "uneven", "llama", hidden_size=256, intermediate_size=96)
    training = replace(TRAINING, max_steps=1)
    result = qat(uneven, data, tmp_path / "out", settings=QatSettings(format="ternary"), training=training)
    assert any("down_proj.weight and 1 more: stay float, for their rows are no multiple of 256" in note
               for note in result.notes)  # fmt: skip
    written = open_checkpoint(tmp_path / "out")
    assert written.format("model.layers.0.mlp.down_proj.weight") is None
    assert written.format("model.layers.0.mlp.up_proj.weight") == TERNARY


@pytest.mark.parametrize("train", ["scales", "minimums"])
def test_frozen_codes_leave_nothing_to_train(train, model, data, tmp_path) -> None:
    settings = QatSettings(format="ternary", train=train)
    with pytest.raises(InputError, match=rf"--train {train} needs blocks with scales of their own.*use --train full"):
        qat(model, data, tmp_path / "out", settings=settings, training=TRAINING)
    quantize_checkpoint(model, tmp_path / "packed", format="ternary")
    with pytest.raises(InputError, match=f"--train {train} needs blocks with scales of their own"):
        qat(tmp_path / "packed", data, tmp_path / "out", settings=QatSettings(train=train), training=TRAINING)
    assert not (tmp_path / "out").exists()


def test_ternary_weights_take_a_rate_of_their_own() -> None:
    plain = FinetuneSettings()
    for settings, rate in (
        (QatSettings(format="ternary"), TERNARY_RATE),
        (QatSettings(format="TQ2_0"), TERNARY_RATE),
        (QatSettings(format="ternary", train="lora"), 2e-4),
        (QatSettings(format="q4_1"), 1e-5),
    ):
        assert settings.training(plain).rate == rate
    assert QatSettings(format="ternary").training(replace(plain, learning_rate=3e-3)).rate == 3e-3


def test_fewer_levels_there_are_none(model, data, tmp_path) -> None:
    with pytest.raises(InputError, match="tq2_0 cannot use 2 levels"):
        qat(model, data, tmp_path / "out", settings=QatSettings(format="ternary", levels=2), training=TRAINING)


def test_a_model_no_layer_of_which_fits_is_refused(make_model, data, tmp_path) -> None:
    narrow = make_model(tmp_path / "narrow", "llama", hidden_size=128, intermediate_size=192)
    with pytest.raises(InputError, match=r"no layer can be packed: .*no rows of a multiple of 256 \(tq2_0\)"):
        qat(narrow, data, tmp_path / "out", settings=QatSettings(format="ternary"), training=TRAINING)
    assert list(tmp_path.iterdir()) == [tmp_path / "narrow"]
