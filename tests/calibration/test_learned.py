"""Learning scales: nearer to the original on text that it did not see, never farther, and the same bytes every time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from quantlab import InputError, load_model, quantize_checkpoint
from quantlab.calibration import learnable_parts, scale_training, teacher
from quantlab.calibration.learned import EVALUATIONS, LearnSettings, learn_scales
from quantlab.calibration.padded_windows import pad_windows
from quantlab.checkpoint import open_checkpoint
from quantlab.formats import FORMATS
from quantlab.formats.parts import codes_of
from quantlab.nn import learnable_scales

SETTINGS = LearnSettings(steps=12, step_tokens=120, learning_rate=0.02, norm_rate=0.003, code_rate=0.1)


def samples(count: int = 24, seed: int = 0) -> list[list[int]]:
    """Windows of 20 to 30 tokens out of a few, so that little text has much in common."""
    generator = np.random.default_rng(seed)
    return [generator.integers(3, 19, generator.integers(20, 31)).tolist() for _ in range(count)]


@pytest.fixture(scope="module")
def packed(float_model, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "q4_1"
    quantize_checkpoint(float_model, out, format="q4_1", uniform=True)
    return out


@pytest.fixture(scope="module")
def packed_llama(llama_model, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "q4_1"
    quantize_checkpoint(llama_model, out, format="q4_1", uniform=True)
    return out


def divergence(original: Path, other: Path, windows: list[list[int]]) -> float:
    """KL(original || other) per token, straight from the definition."""
    models, total, count = [load_model(original), load_model(other)], 0.0, 0
    for window in windows:
        with torch.no_grad():
            p, q = (F.log_softmax(model(torch.tensor([window])).logits[0].double(), dim=-1) for model in models)
        total += float((p.exp() * (p - q)).sum())
        count += len(window)
    return total / count


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def learn(source: Path, start: Path, folder: Path, settings: LearnSettings = SETTINGS, **options):
    out = options.pop("out", folder / "learned")
    return out, learn_scales(source, start, samples(), out, folder / "work", settings, **options)


def test_the_result_is_nearer_to_the_original_and_only_scales_have_changed(float_model, packed, tmp_path):
    out, report = learn(float_model, packed, tmp_path)
    held_out = [samples()[i] for i in pad_windows(samples(), 512, SETTINGS.seed).held_out]
    assert report.best_step > 0
    assert report.notes == ()
    assert report.best_divergence < 0.8 * report.start_divergence
    assert report.start_divergence == pytest.approx(divergence(float_model, packed, held_out), rel=0.01)
    assert report.best_divergence == pytest.approx(divergence(float_model, out, held_out), rel=0.01)
    assert divergence(float_model, out, samples(seed=1)) < divergence(float_model, packed, samples(seed=1))
    before, after = weights_of(packed), weights_of(out)
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        assert tensor.shape == before[name].shape
        assert tensor.dtype == before[name].dtype
        if tensor.dtype == torch.uint8:
            assert not torch.equal(tensor, before[name])
            assert torch.equal(codes_of(tensor, FORMATS["q4_1"]), codes_of(before[name], FORMATS["q4_1"]))
        else:
            assert torch.equal(tensor, before[name])
    made = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (made["method"], made["after"], made["learned"]["best_step"]) == ("learned", "rtn", report.best_step)
    assert not any((tmp_path / "work").iterdir())


def test_norms_are_learned_on_demand(llama_model, packed_llama, tmp_path):
    out, report = learn(llama_model, packed_llama, tmp_path, replace(SETTINGS, train_norms=True))
    held_out = [samples()[i] for i in pad_windows(samples(), 512, SETTINGS.seed).held_out]
    assert report.best_divergence == pytest.approx(divergence(llama_model, out, held_out), rel=0.01)
    before, after = weights_of(packed_llama), weights_of(out)
    assert {name for name in after if torch.equal(before[name], after[name])} == set()


def test_trained_codes_are_written_as_they_were_measured(llama_model, packed_llama, tmp_path):
    settings = replace(SETTINGS, train_codes=True, code_rate=0.06, learning_rate=0.01, steps=20)
    out, report = learn(llama_model, packed_llama, tmp_path, settings)
    held_out = [samples()[i] for i in pad_windows(samples(), 512, SETTINGS.seed).held_out]
    assert report.best_divergence == pytest.approx(divergence(llama_model, out, held_out), rel=0.01)
    packed = [tensor for tensor in weights_of(out).values() if tensor.dtype == torch.uint8]
    assert report.trained == sum(tensor.numel() // 20 * (32 + 2) for tensor in packed)


def test_same_arguments_give_the_same_bytes(llama_model, packed_llama, tmp_path):
    first, one = learn(llama_model, packed_llama, tmp_path / "1")
    second, two = learn(llama_model, packed_llama, tmp_path / "2")
    other, _ = learn(llama_model, packed_llama, tmp_path / "3", replace(SETTINGS, seed=1))
    read = [(folder / "model.safetensors").read_bytes() for folder in (first, second, other)]
    assert read[0] == read[1] != read[2]
    assert one.history == two.history


@pytest.mark.parametrize("extra", [{}, {"train_norms": True, "train_codes": True}], ids=["scales", "all"])
def test_threads_change_no_bit(llama_model, packed_llama, tmp_path, monkeypatch, extra):
    """Neither ours nor torch's: not of the targets, not of any measurement, not of what is written. The activations are
    partly computed twice in one of the runs.
    """
    settings = replace(SETTINGS, steps=4, window_tokens=60, **extra)  # two windows in a part, two or three parts a step
    before, found = torch.get_num_threads(), []
    try:
        for threads, torchs in ((1, 1), (2, 3), (3, 2)):
            torch.set_num_threads(torchs)
            if threads == 3:
                monkeypatch.setattr("quantlab.calibration.recomputing.KEPT_ACTIVATIONS", 0)
            out, report = learn(llama_model, packed_llama, tmp_path / f"{threads}", settings, threads=threads)
            assert torch.get_num_threads() == torchs
            found.append(((out / "model.safetensors").read_bytes(), report.history, report.best_step))
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]
    assert found[0][2] > 0  # something was trained


@pytest.mark.parametrize("threads", [1, 2])
def test_torch_divides_nothing_among_threads(llama_model, packed_llama, tmp_path, monkeypatch, threads):
    """Of matrices as small as these it would not change the bits if it did."""
    seen: dict[str, set[int]] = {}
    watched = [
        (teacher, "logits_of"), (scale_training.ScaleTraining, "_divergence"), (learnable_scales, "_block_gradients"),
        (scale_training.ScaleTraining, "_clip_gradients"), (learnable_parts.LearnableParts, "__init__"),
        (learnable_parts.LearnableParts, "tensors"),
    ]  # fmt: skip

    def spied(name, whole):
        def spy(*arguments, **options):
            seen.setdefault(name, set()).add(torch.get_num_threads())
            return whole(*arguments, **options)

        return spy

    for owner, name in watched:
        monkeypatch.setattr(owner, name, spied(name, getattr(owner, name)))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        learn(llama_model, packed_llama, tmp_path, replace(SETTINGS, steps=2, window_tokens=60), threads=threads)
    finally:
        torch.set_num_threads(before)
    assert seen == {name: {1} for _, name in watched}


def test_a_step_has_several_parts(llama_model, packed_llama, tmp_path, monkeypatch):
    """So that the test above divides something."""
    parts = []
    whole = scale_training.ScaleTraining._parts

    def spied(self, windows):
        parts.append([len(part) for part in whole(self, windows)])
        return whole(self, windows)

    monkeypatch.setattr(scale_training.ScaleTraining, "_parts", spied)
    learn(llama_model, packed_llama, tmp_path, replace(SETTINGS, steps=1, window_tokens=60))
    assert parts == [[2, 1], [2, 2, 1], [2, 1]]  # held-out windows, a step's, held-out ones again


@pytest.mark.parametrize("after", [1, 5])
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(llama_model, packed_llama, tmp_path, after):
    settings = replace(SETTINGS, train_norms=True, train_codes=True, save_seconds=0.0)
    whole, report = learn(llama_model, packed_llama, tmp_path / "whole", settings)
    seen: list[int] = []

    def stop(done: int, total: int, note: str) -> None:
        if "held out" in note:
            seen.append(done)
            if len(seen) == after:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn(llama_model, packed_llama, tmp_path / "cut", settings, progress=stop)
    assert not (tmp_path / "cut" / "learned").exists()
    go_on = {"progress": lambda done, total, note: seen.append(done), "threads": 2}  # the first had one a core
    cut, resumed = learn(llama_model, packed_llama, tmp_path / "cut", settings, **go_on)
    assert seen[after] > seen[after - 1]  # it did not begin again
    assert (cut / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert resumed.history == report.history


def test_unfinished_work_of_another_run_is_refused(llama_model, packed_llama, tmp_path):
    def stop(done: int, total: int, note: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn(llama_model, packed_llama, tmp_path, progress=stop)
    with pytest.raises(InputError, match="unfinished work of other"):
        learn(llama_model, packed_llama, tmp_path, replace(SETTINGS, steps=9))


def test_a_start_that_no_step_improves_is_kept(llama_model, packed_llama, tmp_path):
    out, report = learn(llama_model, packed_llama, tmp_path, replace(SETTINGS, learning_rate=50.0, steps=5))
    assert report.best_step == 0
    assert report.best_divergence == report.start_divergence
    assert len(report.notes) == 1
    assert "start was kept" in report.notes[0]
    before, after = weights_of(packed_llama), weights_of(out)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_run_that_no_longer_improves_stops(llama_model, packed_llama, tmp_path):
    _, report = learn(llama_model, packed_llama, tmp_path, replace(SETTINGS, learning_rate=50.0, steps=40, patience=2))
    assert report.steps == 2 * (40 // EVALUATIONS)


@pytest.mark.parametrize("format", ["q4_0", "q5_0", "q5_1", "q8_0"])
def test_every_format_is_learned_in_a_gguf_file(llama_model, tmp_path, format):
    start = tmp_path / "start.gguf"
    quantize_checkpoint(llama_model, start, format=format, uniform=True)
    out, report = learn(llama_model, start, tmp_path, replace(SETTINGS, learning_rate=0.005), out=tmp_path / "l.gguf")
    assert report.best_step > 0
    learned, begun = open_checkpoint(out), open_checkpoint(start)
    assert learned.names == begun.names
    assert out.stat().st_size == pytest.approx(start.stat().st_size, rel=0.01)
    assert all(learned.stored_type(name) == begun.stored_type(name) for name in begun.names)
    assert divergence(llama_model, out, samples(seed=1)) < divergence(llama_model, start, samples(seed=1))


def test_blocks_computed_twice_train_alike(float_model, packed, tmp_path, monkeypatch):
    settings = replace(SETTINGS, steps=3)
    whole, _ = learn(float_model, packed, tmp_path / "1", settings)
    monkeypatch.setattr("quantlab.calibration.recomputing.KEPT_ACTIVATIONS", 0)
    again, _ = learn(float_model, packed, tmp_path / "2", settings)
    assert (whole / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()


def test_few_windows_at_once_train_like_many(llama_model, packed_llama, tmp_path, monkeypatch):
    settings = replace(SETTINGS, steps=4)
    _, whole = learn(llama_model, packed_llama, tmp_path / "1", settings)
    monkeypatch.setattr(scale_training, "LOGITS_AT_ONCE", 1)
    _, parts = learn(llama_model, packed_llama, tmp_path / "2", settings)
    assert [step for step, _ in parts.history] == [step for step, _ in whole.history]
    assert np.allclose([value for _, value in parts.history], [value for _, value in whole.history], rtol=0.02)


def test_a_model_of_other_tensors_is_refused(float_model, make_model, packed_llama, tmp_path):
    other = make_model(tmp_path / "other", "llama", intermediate_size=128)
    with pytest.raises(InputError, match="has other tensors than"):
        learn(other, packed_llama, tmp_path)


def test_a_float_model_has_no_scales_to_learn(llama_model, tmp_path):
    with pytest.raises(InputError, match="holds no quantized tensor"):
        learn(llama_model, llama_model, tmp_path)


def test_an_existing_output_is_refused_before_anything_is_trained(llama_model, packed_llama, tmp_path):
    (tmp_path / "learned").mkdir()
    with pytest.raises(InputError, match="exists already"):
        learn(llama_model, packed_llama, tmp_path, progress=lambda *_: pytest.fail("training began"))


@pytest.mark.parametrize("field", ["steps", "learning_rate", "temperature"])
def test_settings_out_of_range_are_refused(field):
    with pytest.raises(InputError, match=field):
        LearnSettings(**{field: 0})
